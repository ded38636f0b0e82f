# FMA2D-B with UPerNet on ADE20K; pre-training on ImageNet-22K.
_base_ = [
    "../_base_/models/upernet_swin.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/default_runtime.py",
    "../_base_/adamw_160k.py",
]
custom_imports = dict(imports=["fma2d.mmseg"])
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        _delete_=True,
        type="FMA2D",
        arch="base",
        img_size=crop_size,
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/fma2d_base_in22k.safetensors"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024], num_classes=150),
    auxiliary_head=dict(in_channels=512, num_classes=150),
    # Whole images; --cfg-options model.test_cfg.mode=slide for a window.
    test_cfg=dict(mode="whole", crop_size=crop_size, stride=(341, 341)),
)
# Swin's: the head learns at the backbone's rate.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"head": dict(lr_mult=1.0)}))
train_dataloader = dict(batch_size=2, num_workers=4)
