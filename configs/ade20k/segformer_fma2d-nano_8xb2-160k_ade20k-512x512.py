# FMA2D nano with SegFormer's head on ADE20K; pre-training on ImageNet-1K.
_base_ = ["../_base_/segformer_fma2d.py", "../_base_/datasets/ade20k.py"]
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    test_cfg=dict(crop_size=crop_size, stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
