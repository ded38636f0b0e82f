# FMA2D with SegFormer's head.
_base_ = ["mmseg::_base_/models/segformer_mit-b0.py"]
custom_imports = dict(imports=["fma2d.mmseg"])
model = dict(backbone=dict(_delete_=True, type="FMA2D", arch="nano", img_size=224, drop_path_rate=0.1))
