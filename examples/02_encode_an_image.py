"""Encode images of different shapes to visual tokens, save the encoder and load it again.

python examples/02_encode_an_image.py [IMAGE ...]
"""

import sys
import tempfile

import torch

import uhd
from uhd.demo import page_image, untrained_encoder

images = sys.argv[1:] or [page_image(), page_image(900, 300)]

# With weights at hand: uhd.VisualEncoder.from_pretrained("folder of a CLIP vision model", out_dim=4096)
encoder = untrained_encoder(out_dim=256)
with torch.inference_mode():
    encoded = encoder(images)
for image in encoded:
    print(image.plan)
    print(f"  tokens {tuple(image.tokens.shape)}, views {[tuple(view.shape) for view in image.views]}")
    print(f"  {image.layout.text()!r}")

with tempfile.TemporaryDirectory() as folder:
    encoder.save_pretrained(folder)
    again = uhd.VisualEncoder.from_pretrained(folder)
with torch.inference_mode():
    assert torch.equal(again(images)[0].tokens, encoded[0].tokens)
print("saved, loaded, and equal")
