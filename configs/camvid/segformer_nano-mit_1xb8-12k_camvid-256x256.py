# MiT's attention on FMA2D nano's skeleton; model.backbone.attention=near or windows for the others.
_base_ = ["segformer_fma2d-nano_1xb8-12k_camvid-256x256.py"]
custom_imports = dict(imports=["research.pictures"])
model = dict(backbone=dict(type="OtherAttention", attention="mit"))
