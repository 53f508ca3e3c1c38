"""Folders of pictures for `dcdit train` from packages that anyone can install, a sub-folder for each class.

    apt-get install dataset-fashion-mnist              # MIT; 60 000 and 10 000 of 28×28
    python examples/datasets.py fashion-mnist FOLDER
    apt-get install fonts-noto-color-emoji unicode-data && pip install fonttools    # OFL 1.1; 1 377 of 136×136
    python examples/datasets.py emoji FOLDER

FOLDER/train and FOLDER/test; LICENCE.txt says the licence. Emoji have one code point each, by Unicode's groups; a
tenth is for tests. The idx files of Fashion-MNIST need no folder to be trained on: data.kind=idx.
"""

import io
import re
import sys
import zlib
from pathlib import Path

from PIL import Image

FASHION = "/usr/share/datasets/fashion-mnist"
GARMENTS = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI = "/usr/share/unicode/emoji/emoji-test.txt"


def fashion_mnist():
    """(train or test, class, name, picture) of each garment."""
    from dcdit.data.idx import Idx

    for half, prefix in (("train", "train"), ("test", "t10k")):
        source = Idx(f"{FASHION}/{prefix}")
        for i, (image, label) in enumerate(zip(source.images, source.labels, strict=True)):
            yield half, GARMENTS[label], f"{i:05d}", Image.fromarray(image)


def emoji():
    """(train or test, Unicode's group, code point, picture on white) of each emoji of one code point.

    Other emoji differ in a skin tone, or are ligatures of the font.
    """
    from fontTools.ttLib import TTFont

    font = TTFont(FONT)
    glyphs, bitmaps = font.getBestCmap(), font["CBDT"].strikeData[0]
    group = ""
    for line in Path(EMOJI).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = re.sub(r"\W+", "-", line.split(":")[1].strip().lower())
        points = line.split(";")[0].split()
        if not re.match(r"[0-9A-F]+ .*; fully-qualified", line) or [p for p in points[1:] if p != "FE0F"]:
            continue
        bitmap = bitmaps.get(glyphs.get(int(points[0], 16), ""))
        if bitmap is not None:
            picture = Image.open(io.BytesIO(bitmap.imageData)).convert("RGBA")
            square = Image.new("RGBA", (max(picture.size),) * 2, "white")
            square.alpha_composite(picture, tuple((square.width - side) // 2 for side in picture.size))
            half = "test" if zlib.crc32(points[0].encode()) % 10 == 0 else "train"
            yield half, group, points[0].lower(), square.convert("RGB")


SETS = {
    "fashion-mnist": (
        fashion_mnist,
        "Fashion-MNIST, Zalando SE, MIT licence: https://github.com/zalandoresearch/fashion-mnist",
    ),
    "emoji": (emoji, "Noto Color Emoji, Google, SIL Open Font License 1.1: https://github.com/googlefonts/noto-emoji"),
}


def main(name, folder):
    """Write the pictures of a set, and count them."""
    pictures, licence = SETS[name]
    counts = {}
    for half, group, file, picture in pictures():
        place = Path(folder, half, group)
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{file}.png")
        counts[half, group] = counts.get((half, group), 0) + 1
    Path(folder, "LICENCE.txt").write_text(licence + "\n", encoding="utf-8")
    for half in ("train", "test"):
        own = {group: count for (where, group), count in counts.items() if where == half}
        print(f"{half}: {sum(own.values())} pictures, " + ", ".join(f"{count} {group}" for group, count in own.items()))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SETS:
        sys.exit(f"usage: python examples/datasets.py {'|'.join(SETS)} FOLDER")
    main(*sys.argv[1:])
