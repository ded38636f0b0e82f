# SegFormer (MiT-B0) on generated scenes (tools/make_scenes.py), a schedule of minutes on a CPU, from random weights. Of
# ADE20K's classes the head knows those that occur: with all 150, the loss took two fifths of an iteration.
_base_ = [
    "models/segformer_mit-b0.py",
    "datasets/ade20k.py",
    "default_runtime.py",
    "schedules/schedule_20k.py",
]
data_root = "data/scenes"
crop_size = (128, 128)
# The classes that occur and their weights in the loss, the median class's share of pixels over the class's own (median
# frequency balancing, arXiv:1411.4734): lamps cover a hundredth of a picture, roads a quarter.
weights = {
    "building": 0.54,
    "sky": 0.25,
    "tree": 1.0,
    "road": 0.15,
    "grass": 0.34,
    "sidewalk": 0.27,
    "person": 3.9,
    "mountain": 0.74,
    "car": 1.9,
    "field": 0.35,
    "fence": 1.9,
    "lamp": 4.6,
    "signboard": 2.2,
    "streetlight": 5.0,
    "van": 1.9,
}
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 128), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
scenes = dict(data_root=data_root, metainfo=dict(classes=list(weights)))
train_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(pipeline=train_pipeline, **scenes))
val_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=test_pipeline, **scenes))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(
        channels=64,
        dropout_ratio=0.0,
        norm_cfg=dict(type="BN"),  # SyncBN trains on several GPUs only
        num_classes=len(weights),
        loss_decode=dict(class_weight=list(weights.values())),
    ),
)

max_iters = 1200
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={"kernels": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    # A slow decay, then a fast one to nothing over the last 200 iterations.
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=100, end=2000, by_epoch=False),
    dict(type="LinearLR", start_factor=1.0, end_factor=0.0, begin=1000, end=max_iters, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=600)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=250, max_keep_ckpts=2),
)
randomness = dict(seed=0)
