# The schedule that research/pictures.md names. Cells of 4 tokens: with 8, a crop of 256 px has coarse levels in the
# first two stages only.
_base_ = ["../_base_/camvid.py"]
model = dict(backbone=dict(img_size=_base_.crop_size))
