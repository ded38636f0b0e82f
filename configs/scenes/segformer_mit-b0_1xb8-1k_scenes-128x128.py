# mmsegmentation's MiT-B0 with the head, the data and the schedule of the FMA2D config beside it.
_base_ = ["mmseg::_base_/models/segformer_mit-b0.py", "../_base_/scenes.py"]
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(channels=128, dropout_ratio=0.0, num_classes=150),
)
