_base_ = ["../_base_/segformer_fma2d.py", "../_base_/scenes.py"]
crop_size = _base_.crop_size
model = dict(
    data_preprocessor=dict(size=crop_size),
    # Cells of 4 tokens: with 8, an image of 128 px has one coarse level in the first stage and none after it.
    backbone=dict(img_size=crop_size, cell_size=4, drop_path_rate=0.0),
    decode_head=dict(channels=128, dropout_ratio=0.0, num_classes=150),
)
