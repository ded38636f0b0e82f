# CamVid as published with SegNet: 367 + 101 + 233 road scenes, 480 x 360, 11 classes; 12000 iterations of 8 crops from
# random weights. Layout and address: docs/pictures.md.
_base_ = ["segformer_fma2d.py"]
data_root = "data/camvid"
crop_size = (256, 256)
max_iters = 12000
void = 11  # a label that counts nowhere
# The classes and their weights in the loss, 1 / ln(1.02 + p) of a class's share p of the training pixels
# (arXiv:1606.02147), scaled to a mean of 1 over them: bicyclists cover 0.3 %, roads 33 %. Weights in full
# proportion to 1 / p draw thin things too thick (docs/segmentation.md).
weights = {
    "sky": 0.80,
    "building": 0.61,
    "pole": 4.79,
    "road": 0.48,
    "pavement": 2.21,
    "tree": 1.25,
    "sign": 4.50,
    "fence": 4.57,
    "car": 1.83,
    "pedestrian": 5.43,
    "bicyclist": 6.27,
}
palette = [
    *([70, 130, 180], [70, 70, 70], [153, 153, 153], [128, 64, 128], [244, 35, 232], [107, 142, 35]),
    *([220, 220, 0], [190, 153, 153], [0, 0, 142], [220, 20, 60], [119, 11, 32]),
]
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val=void),
    backbone=dict(cell_size=4, drop_path_rate=0.0, init_cfg=None),
    decode_head=dict(
        channels=64,
        dropout_ratio=0.0,
        norm_cfg=dict(type="BN"),
        num_classes=len(weights),
        ignore_index=void,
        loss_decode=dict(class_weight=list(weights.values())),
    ),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(480, 360), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75, ignore_index=void),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(480, 360), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
data = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=list(weights), palette=palette),
    img_suffix=".png",
    seg_map_suffix=".png",
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(data_prefix=dict(img_path="train", seg_map_path="trainannot"), pipeline=train_pipeline, **data),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=dict(img_path="val", seg_map_path="valannot"), pipeline=test_pipeline, **data),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=dict(img_path="test", seg_map_path="testannot"), pipeline=test_pipeline, **data),
)
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], ignore_index=void)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys={"head": dict(lr_mult=1.0)}),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=100, end=max_iters, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=2000)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=200, max_keep_ckpts=2),
)
randomness = dict(seed=0)
