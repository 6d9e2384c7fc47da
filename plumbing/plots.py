"""Plots of curves, in panels side by side."""

from collections import defaultdict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from plumbing.images import FONT_SIZE, GAP, INK, PAPER

PANEL = 460, 300  # width and height in pixels of the area of the curves
AXIS = 58  # pixels for the numbers beside and below the curves
TOP = 3 * GAP
GRID = (230, 230, 230)
COLOURS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (23, 190, 207),
)


def ticks(low, high):
    """About five round numbers in [low, high]."""
    size = high - low
    step = 10 ** np.floor(np.log10(size / 2))
    for factor in (1, 2, 5, 10):
        if size / (factor * step) <= 6:
            break
    step *= factor
    first, last = int(np.ceil(low / step)), int(np.floor(high / step))
    return [round(k * step, 10) for k in range(first, last + 1)]


def log_ticks(xs):
    """The ticks of a logarithmic axis: the data's own x if these are whole numbers, else 1, 2, 5, 10, ..."""
    if (xs % 1 == 0).all():
        return sorted(set(xs))
    marks = []
    for k in range(-9, 10):
        for factor in (1, 2, 5):
            mark = factor * 10.0**k
            if xs.min() <= mark <= xs.max():
                marks.append(mark)
    return marks


class Panel:
    """One pair of axes, and where its numbers lie in the image.

    points: (n, 2), all that is to be drawn. left: the first pixel column. shown: as in plot().
    """

    def __init__(self, points, left, log_x, shown):
        self.xs, self.ys = np.array(points, dtype=float).T
        self.left = left
        self.log_x = log_x
        scaled = self.scale(self.xs)
        self.x_low, self.x_high = scaled.min(), scaled.max()
        if self.x_high == self.x_low:
            self.x_high = self.x_low + 1
        reaches = shown if len(self.ys) > 20 else 1
        low, high = np.quantile(self.ys, [0, reaches])
        margin = 0.05 * (high - low or 1)
        self.y_low, self.y_high = low - margin, high + margin

    def scale(self, x):
        return np.log(x) if self.log_x else np.asarray(x)

    def across(self, x):
        """The pixel column of x."""
        width, _ = PANEL
        fraction = (self.scale(x) - self.x_low) / (self.x_high - self.x_low)
        return self.left + fraction * width

    def down(self, y):
        """The pixel row of y; rows outside are moved to the edge."""
        _, height = PANEL
        fraction = (y - self.y_low) / (self.y_high - self.y_low)
        return TOP + height - np.clip(fraction, 0, 1) * height

    def draw_axes(self, pen, font, title, x_label):
        width, height = PANEL
        right, bottom = self.left + width, TOP + height
        middle = self.left + width / 2
        pen.text((middle, TOP - 2 * GAP), title, fill=INK, font=font, anchor="mm")
        pen.text((middle, bottom + 4 * GAP), x_label, fill=INK, font=font, anchor="mm")
        for x in log_ticks(self.xs) if self.log_x else ticks(self.x_low, self.x_high):
            column = self.across(x)
            pen.line((column, self.down(self.y_low), column, self.down(self.y_high)), fill=GRID)
            pen.text((column, bottom + GAP), f"{x:g}", fill=INK, font=font, anchor="mt")
        for y in ticks(self.y_low, self.y_high):
            row = self.down(y)
            pen.line((self.left, row, right, row), fill=GRID)
            pen.text((self.left - GAP, row), f"{y:g}", fill=INK, font=font, anchor="rm")
        pen.rectangle((self.left, TOP, right, bottom), outline=INK)

    def draw_curve(self, pen, points, colour):
        line = [(self.across(x), self.down(y)) for x, y in points]
        pen.line(line, fill=colour, width=2, joint="curve")
        if len(line) <= 20:
            for point in line:
                pen.circle(point, 3, fill=colour)


def plot(panels, x_label, log_x=False, shown=1.0):
    """Curves in panels side by side, {title: {name: [(x, y), ...]}}, as an RGB PIL.Image.

    log_x: whether the x axis is logarithmic. shown: the fraction of the values, from the lowest on, that the y axis
    covers in a panel of more than 20 points; higher ones lie on its edge.
    """
    width, height = PANEL
    each = width + AXIS + GAP
    size = len(panels) * each + GAP, height + AXIS + 3 * GAP
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    pen.fontmode = "L"
    font = ImageFont.load_default(FONT_SIZE)
    for number, (title, curves) in enumerate(panels.items()):
        points = sum(curves.values(), [])
        panel = Panel(points, AXIS + number * each, log_x, shown)
        panel.draw_axes(pen, font, title, x_label)
        for row, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[row % len(COLOURS)]
            panel.draw_curve(pen, curve, colour)
            place = panel.left + width - GAP, TOP + GAP + row * (FONT_SIZE + 4)
            pen.text(place, name, fill=colour, font=font, anchor="rt")
    return image


def plot_quality(rows):
    """Quality against passes of the network, and against seconds per image; each row is a point of its curve.

    rows: {"curve", "passes", and results of samples}. Returns None if no curve has several numbers of passes, or no
    result measures quality.
    """
    panels = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["passes"]):
        axes = {"network passes": row["passes"], "seconds an image": 1 / row["images_per_s"]}
        for key, label in ("overall", "overall score"), ("frechet_distance", "Frechet distance"):
            if key not in row:
                continue
            quality = row[key]["mean"] if key == "overall" else row[key]
            for axis, x in axes.items():
                panels[f"{label} against {axis}"][row["curve"]].append((x, quality))
    points = {(row["curve"], row["passes"]) for row in rows}
    curves = {row["curve"] for row in rows}
    several = len(points) > len(curves)
    return plot(panels, "", log_x=True) if panels and several else None
