# FMA2D-B with SegFormer's head on ADE20K, the model of arXiv:2310.11960v4; pre-training on ImageNet-22K.
_base_ = ["../_base_/segformer_fma2d-base.py", "../_base_/datasets/ade20k.py"]
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    test_cfg=dict(crop_size=crop_size, stride=(341, 341)),
)
train_dataloader = dict(batch_size=2)
