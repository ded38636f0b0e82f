# SegFormer with FMA2D nano on images and masks of your own, from random weights: docs/tutorials/segmentation.md. The
# first lines are yours: where the data is, how file names end, and the classes in the order of their numbers in the
# masks. These are CamVid's, whose number 11 means that nobody said what it is.
_base_ = ["../_base_/segformer_fma2d.py"]
data_root = "data/own"
suffixes = dict(img_suffix=".png", seg_map_suffix=".png")
classes = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist", "void"),
)
crop_size = (256, 256)
max_iters = 2000

palette = [[53 * i % 256, 101 * i % 256, 197 * i % 256] for i in range(1, len(classes) + 1)]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size, cell_size=4, init_cfg=None),
    decode_head=dict(num_classes=len(classes), norm_cfg=dict(type="BN")),
)
read = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
train_pipeline = [
    *read,
    dict(type="RandomResize", scale=(512, 384), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 384), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
data = dict(type="BaseSegDataset", data_root=data_root, metainfo=dict(classes=classes, palette=palette), **suffixes)
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"), pipeline=train_pipeline, **data
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=dict(img_path="images/val", seg_map_path="masks/val"), pipeline=test_pipeline, **data),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(custom_keys={"head": dict(lr_mult=1.0)}))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=100, end=max_iters, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=500)
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500, max_keep_ckpts=2))
