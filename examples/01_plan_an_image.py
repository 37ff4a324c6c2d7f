"""Plan an image: where it is cut, what that costs, and what else was considered. Loads no tensor library.

python examples/01_plan_an_image.py [WIDTHxHEIGHT]
"""

import sys

import uhd
from uhd.slicing import locate, token_range, view_box

width, height = map(int, (sys.argv[1] if len(sys.argv) > 1 else "672x1008").split("x"))

plan = uhd.plan((height, width))
print(plan)
for candidate in uhd.candidates((height, width))[:4]:
    print(f"  considered {candidate.grid[0]}x{candidate.grid[1]} (rows x columns), score {candidate.score:.4f}")

print("\nwithin a budget of 200 tokens:")
print(uhd.plan((height, width), max_tokens=200))

print("\nthe same image by other rules:")
for name in uhd.strategies():
    print(" ", uhd.strategy(name)((height, width)))

print("\nthe image's centre is seen by:")
for hit in locate(plan, (height / 2, width / 2)):
    top, left, bottom, right = map(float, view_box(plan, hit.view))
    tokens = token_range(plan, hit.view)
    print(
        f"  view {hit.view} ({plan.views[hit.view].kind}), patch {hit.patch}, "
        f"visual tokens {tokens.start}..{tokens.stop - 1}, "
        f"which show rows {top:.0f}..{bottom:.0f}, columns {left:.0f}..{right:.0f}"
    )
