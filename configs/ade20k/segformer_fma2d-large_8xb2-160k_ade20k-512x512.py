# FMA2D-L with SegFormer's head on ADE20K, the model of arXiv:2310.11960v4; pre-training on ImageNet-22K.
_base_ = [
    "../_base_/segformer_fma2d.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/adamw_160k.py",
]
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch="large",
        img_size=crop_size,
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/fma2d_large_in22k.safetensors"),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536], channels=768, num_classes=150),
    # Whole images; --cfg-options model.test_cfg.mode=slide for a window.
    test_cfg=dict(mode="whole", crop_size=crop_size, stride=(341, 341)),
)
train_dataloader = dict(batch_size=2, num_workers=4)
