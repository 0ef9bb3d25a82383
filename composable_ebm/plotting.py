"""Stand-in until the real module lands."""
from pathlib import Path
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
def save_grid(images, path, columns=8, metadata=None):
    from torchvision.utils import make_grid
    grid = make_grid((images.detach().cpu() + 1) / 2, nrow=columns)
    info = PngInfo()
    for k, v in (metadata or {}).items():
        info.add_text(k, v)
    Image.fromarray((grid.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(Path(path), pnginfo=info)
