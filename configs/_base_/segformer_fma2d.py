# FMA2D nano with SegFormer's head, 160k iterations; tested on whole images (model.test_cfg.mode=slide for a window).
_base_ = [
    "models/segformer_mit-b0.py",
    "default_runtime.py",
    "adamw_160k.py",
]
custom_imports = dict(imports=["fma2d.mmseg"])
model = dict(
    backbone=dict(
        _delete_=True,
        type="FMA2D",
        arch="nano",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="checkpoints/fma2d_nano_in1k.safetensors"),
    ),
    decode_head=dict(num_classes=150),
)
