# The first part of a training of a quarter of an hour of one core: pictures of half the size, at a quarter of the cost.
_base_ = ["segformer_fma2d-nano_1xb8-12k_camvid-256x256.py"]
crop_size = (128, 128)
img_size = (256, 256)  # whose kernels the second part goes on with
max_iters = 600
model = dict(data_preprocessor=dict(size=crop_size), backbone=dict(img_size=img_size))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(240, 180), ratio_range=(0.6, 1.8), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75, ignore_index=_base_.void),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=1e-3, power=1.0, begin=100, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
