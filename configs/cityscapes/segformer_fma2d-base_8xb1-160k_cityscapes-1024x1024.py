# FMA2D-B with SegFormer's head on Cityscapes; pre-training on ImageNet-22K.
_base_ = ["../_base_/segformer_fma2d-base.py", "../_base_/datasets/cityscapes_1024x1024.py"]
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size),
    decode_head=dict(num_classes=19),
    test_cfg=dict(crop_size=crop_size, stride=(768, 768)),
)
train_dataloader = dict(batch_size=1, num_workers=4)
