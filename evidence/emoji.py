"""Make shards of emoji: some 3,700 things, each drawn in up to four styles, with captions that a person would type.

    python data.py emoji                                      14,000 images in four styles, fetched by npm
    python data.py emoji --styles=google,twitter,fluent       without OpenMoji, the only one drawn from SVG
    python data.py emoji --pictures=out/emoji.zip             keeps the images in a file of 35 MB, for use offline

Names and tags are those of the Unicode CLDR, from the openmoji package, which is therefore always fetched. Two sets are
held out, in every skin tone: out/val has emoji that training never shows, and out/combinations/val has emoji that
training shows in other styles only.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from plumbing.examples import decode_image
from plumbing.folders import hashed
from plumbing.images import resize_and_crop
from plumbing.paths import at_home
from plumbing.prepare import write_splits

PACKAGES = {  # style: the npm package, the paths of its pictures, and their licence
    "google": ("emoji-datasource-google@16.0.0", r"img/google/64/(.+)\.png",
               "Noto Emoji, https://github.com/googlefonts/noto-emoji, Apache License 2.0"),
    "twitter": ("emoji-datasource-twitter@16.0.0", r"img/twitter/64/(.+)\.png",
                "Twemoji, https://github.com/twitter/twemoji, CC BY 4.0, copyright Twitter and other contributors"),
    "openmoji": ("openmoji@17.0.0", r"color/svg/(.+)\.svg",
                 "OpenMoji, https://openmoji.org, CC BY-SA 4.0, by the OpenMoji project; here as pixels"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", r"assets/(.+)\.webp",
               "Fluent Emoji, https://github.com/microsoft/fluentui-emoji, MIT License, copyright Microsoft"),
}
NAMES = "data/openmoji.json"  # in the package openmoji
WORDS = "words.json"  # in a file of --pictures
SIZE = 64  # pixels
NPM = shutil.which("npm") or "npm"  # on Windows npm.cmd, which subprocess finds by its full path only
RASTERIZER = "@resvg/resvg-js@2.6.2"
RASTERIZE = """const svg = require("@resvg/resvg-js"), fs = require("fs");
const options = { fitTo: { mode: "width", value: %d } };
for (const name of fs.readdirSync("."))
    if (name.endsWith(".svg"))
        fs.writeFileSync(name.replace("svg", "png"), new svg.Resvg(fs.readFileSync(name), options).render().asPng());
""" % SIZE
VAL, COMBINATIONS = 0.05, 0.05  # the fractions of emoji, and of an emoji's styles, that are held out
COPIES = 3  # in train, of emoji without a skin tone: else half of an epoch would be people and hands, in all tones
PEOPLE = ("man", "woman", "person", "boy", "girl", "adult", "child")
# groups whose images may be mirrored, except where a name speaks of left, right or writing
SYMMETRIC = ("smileys-emotion", "people-body", "animals-nature", "food-drink")
ONE_SIDED = re.compile(r"left|right|speech|thought|hundred|anger|zzz|facing")


def code_of(text):
    """The code points of an emoji's file name or hexcode in one form, without variation selectors, with skin tones."""
    points = [int(point, 16) for point in re.split("[-_]", text)]
    return "-".join(f"{point:x}" for point in points if point != 0xFE0F)


def with_article(name):
    """A name with its article, if it takes one: "a red apple", "an apple", "women holding hands"."""
    noun = re.split(r" (?:with|of|in|on|from|holding|and) ", name)[0].split()[-1]
    if noun in ("women", "men", "people", "hands") or noun.endswith("s") and not noun.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def described(annotation):
    """The name of an emoji as one would say it, and the part "with ..." that may follow it, from CLDR's name.

    "man: dark skin tone, beard" gives "a man" and " with beard and dark skin tone".
    """
    name, _, rest = annotation.lower().replace("’", "'").replace("“", "").replace("”", "").partition(": ")
    if name in ("flag", "keycap"):
        return (f"the flag of {rest}" if name == "flag" else f"the key {rest}"), ""
    parts = [part for part in rest.split(", ") if part]
    people = [part for part in parts if part in PEOPLE]
    tones = [part.removesuffix(" skin tone") for part in parts if part.endswith(" skin tone")]
    facing = [part for part in parts if part.startswith("facing ")]
    having = ["bald head" if part == "bald" else part for part in parts
              if part not in people + facing and not part.endswith(" skin tone")]
    having += [f"{' and '.join(tones)} skin tone"] if tones else []
    words = [with_article(name)] + ([f"of {' and '.join(people)}"] if people else []) + facing
    return " ".join(words), f" with {' and '.join(having)}" if having else ""


def head(annotation):
    """The noun of a name: "apple" of "red apple", "face" of "kissing face with closed eyes"."""
    return re.split(r": | (?:with|of|in|on|from) ", annotation.lower())[0].split()[-1]


def read_words(table):
    """{code: (up to three names, CLDR's first; a dict of facts to store)} from the entries of openmoji.json."""
    table = [emoji for emoji in table if emoji["group"] not in ("extras-openmoji", "extras-unicode", "component")]
    things = [emoji for emoji in table if emoji["group"] not in ("people-body", "flags", "symbols")]
    nouns = {head(emoji["annotation"]) for emoji in things}
    named = {code_of(emoji["hexcode"]): emoji for emoji in table}
    words = {}
    for code, emoji in named.items():
        concept = code_of(emoji["skintone_base_hexcode"] or emoji["hexcode"])
        name, having = described(emoji["annotation"])
        # only tags that are names of other emoji: "apple" and "fruit", but not "diet" or "yay"
        tags = emoji["tags"].lower().split(", ") if emoji in things else []
        others = [head(emoji["annotation"]), *tags] if emoji in things else []
        names = dict.fromkeys([name + having, *(with_article(tag) for tag in others if tag in nouns)])
        symmetric = emoji["group"] in SYMMETRIC and not ONE_SIDED.search(emoji["annotation"].lower())
        words[code] = list(names)[:3], {"concept": concept, "group": emoji["group"], "mirror": symmetric}
    return words


def fetch(packages, folder):
    """Let npm download packages into a folder; return the paths of their .tgz files."""
    command = [NPM, "pack", "--json", *packages]
    try:
        packed = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise OSError(f"npm could not fetch {', '.join(packages)} ({error}): install npm, or name files that "
                      "`npm pack` made elsewhere with --source=FILE.tgz") from error
    return [Path(folder) / package["filename"] for package in packed]


def read_packages(paths):
    """The files that any style needs, in each .tgz: {npm name: {path: bytes}}."""
    wanted = re.compile("|".join([*(pattern for _, pattern, _ in PACKAGES.values()), r"package\.json", NAMES]))
    packages = {}
    for path in tqdm(paths, desc="read", leave=False):
        try:
            with tarfile.open(path, "r:gz") as tar:
                files = {name: tar.extractfile(member).read() for member in tar if member.isfile()
                         and wanted.fullmatch(name := member.name.removeprefix("package/"))}
            packages[json.loads(files["package.json"])["name"]] = files
        except (tarfile.TarError, EOFError, OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as a package of npm's ({error!r}): fetch it again with "
                             "`npm pack`") from error
    return packages


def rasterize(svgs):
    """PNG bytes {code: bytes} of SVG bytes {code: bytes}, by a library from npm: no Python package here draws SVG."""
    with tempfile.TemporaryDirectory() as folder:
        for code, svg in svgs.items():
            (Path(folder) / f"{code}.svg").write_bytes(svg)
        try:
            for command in [NPM, "install", "--silent", RASTERIZER], ["node", "-e", RASTERIZE]:
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise OSError(f"OpenMoji's SVG cannot be drawn ({error}): install npm and node, or leave it out, "
                          f"--styles={','.join(style for style in PACKAGES if style != 'openmoji')}") from error
        return {code: (Path(folder) / f"{code}.png").read_bytes() for code in svgs}


def on_white(suffix, data):
    """A picture of any size as PNG bytes of SIZE x SIZE pixels, transparency over white."""
    file = io.BytesIO()
    resize_and_crop(decode_image({suffix: data}), SIZE, SIZE).save(file, "png")
    return file.getvalue()


def captions_of(names, style):
    """The captions of a picture, a list; each epoch draws one of them at random.

    The name with the style is twice as likely as the name alone; synonyms also come with and without the style.
    """
    first, *others = names
    styled = [f"{name}, {style} style" for name in (first, first, *others)]
    return [*styled, first, *others[:1]]


def splits_of(pairs):
    """{(concept, style): split} of pairs (concept, style).

    Hashes of concept and pair decide, so that a new style does not move the others' pairs. A concept without a style to
    train on goes to "val".
    """
    def split_of(concept, style):
        if hashed(concept) < VAL:
            return "val"
        return "combinations/val" if hashed(f"{concept} {style}") < COMBINATIONS else "train"

    splits = {pair: split_of(*pair) for pair in pairs}
    known = {concept for (concept, _), split in splits.items() if split == "train"}
    return {pair: split if pair[0] in known else "val" for pair, split in splits.items()}


def pictures_of_packages(styles, sources):
    """The contents of npm's packages: the result of read_words, and {(code, style): PNG bytes on white}.

    sources: paths of .tgz files; None: npm downloads them. Raises ValueError if a package is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        needed = dict.fromkeys(PACKAGES[style][0] for style in (*styles, "openmoji"))  # openmoji has the names
        packages = read_packages(sources or fetch(needed, folder))
    for package in needed:
        if package.rpartition("@")[0] not in packages:
            raise ValueError(f"--source has no {package}, which --styles={','.join(styles)} needs for names or "
                             "pictures")
    words = read_words(json.loads(packages["openmoji"][NAMES]))
    pictures = {}
    for style in styles:
        package, pattern, _ = PACKAGES[style]
        found = {}
        for path, data in packages[package.rpartition("@")[0]].items():
            match = re.fullmatch(pattern, path)
            if match and code_of(match[1]) in words:
                found[code_of(match[1])] = path.rpartition(".")[2], data
        if style == "openmoji":
            drawn = rasterize({code: svg for code, (_, svg) in found.items()})
            found = {code: ("png", png) for code, png in drawn.items()}
        for code, (suffix, data) in tqdm(found.items(), desc=style, leave=False):
            pictures[code, style] = on_white(suffix, data)
    return words, pictures


def pack(path, words, pictures):
    """Write words and pictures {(code, style): PNG bytes} into a zip: WORDS, and lossless STYLE/CODE.webp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(part, "w") as file:
        file.writestr(zipfile.ZipInfo(WORDS), json.dumps(words))
        for (code, style), png in tqdm(pictures.items(), desc="pack", leave=False):
            webp = io.BytesIO()
            Image.open(io.BytesIO(png)).save(webp, "webp", lossless=True)
            file.writestr(zipfile.ZipInfo(f"{style}/{code}.webp"), webp.getvalue())
    os.replace(part, path)


def unpack(path, styles):
    """Read words and pictures {(code, style): webp bytes} of some styles that pack() wrote. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as file:
            words = json.loads(file.read(WORDS))
            pictures = {}
            for name in file.namelist():
                style, _, picture = name.partition("/")
                if style in styles:
                    pictures[picture.removesuffix(".webp"), style] = file.read(name)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"--pictures={path} is no file of pictures that this command wrote ({error}): remove it, to "
                         "have it made anew") from error
    missing = set(styles) - {style for _, style in pictures}
    if missing:
        raise ValueError(f"--pictures={path} has no pictures of the style {min(missing)}: leave it out of --styles, or "
                         "remove the file, to have it made anew")
    return words, pictures


def prepare_emoji(args):
    """Run the command `emoji`: write shards of emoji and LICENCES.txt."""
    styles = args.styles.split(",")
    if unknown := [style for style in styles if style not in PACKAGES]:
        raise ValueError(f"--styles has {unknown[0]!r}: choose among {','.join(PACKAGES)}")
    if args.pictures and Path(args.pictures).exists():
        words, pictures = unpack(args.pictures, styles)
        suffix = "webp"
    else:
        words, pictures = pictures_of_packages(styles, args.source)
        suffix = "png"
        if args.pictures:
            pack(Path(args.pictures), words, pictures)
    splits = splits_of((words[code][1]["concept"], style) for code, style in pictures)
    examples = []
    for (code, style), data in pictures.items():
        names, about = words[code]
        record = {"captions": captions_of(names, style), "style": style, **about}
        split = splits[about["concept"], style]
        copies = COPIES if split == "train" and "skin tone" not in names[0] else 1
        for copy in range(copies):
            members = {suffix: data, "json": json.dumps(record | {"copy": copy}).encode()}
            examples.append((f"{style}-{code}" + f"-{copy}" * (copy > 0), split, members))
    examples.sort(key=lambda example: hashed(example[0]))  # shuffled, for readers that stream
    write_splits(Path(args.out), examples)
    licences = "".join(f"{style}: {PACKAGES[style][2]}, from npm's {PACKAGES[style][0]}.\n" for style in styles)
    (Path(args.out) / "LICENCES.txt").write_text(licences + "Names: Unicode CLDR, Unicode License v3.\n", "utf-8")
    print(f"wrote {args.out}")


def add_commands(command):
    """Add the command `emoji` to data.py, by command(name, function, help, examples) -> parser."""
    examples = ["python data.py emoji", "python data.py emoji --styles=google,twitter,fluent"]
    sub = command("emoji", prepare_emoji, "makes shards of emoji in four styles, fetched by npm", examples)
    sub.add_argument("--styles", default=",".join(PACKAGES), help="the styles; default %(default)s")
    sub.add_argument("--source", type=at_home, action="append", metavar="FILE",
                     help="a .tgz that `npm pack` made, instead of fetching it; may be repeated")
    sub.add_argument("--pictures", type=at_home, metavar="FILE",
                     help="a .zip of all pictures: taken from it if it exists, else kept in it")
    sub.add_argument("--out", default="out/data/emoji", help="the folder of the shards; default %(default)s")
