"""Output on a terminal: --help, and characters that the terminal's encoding lacks."""

import argparse
import ast
import io
import json
import re
import shutil
import sys
import textwrap
import tokenize

COLUMN = 30  # where the sentences of --help begin
WIDEST = 110  # characters of a line of --help
HEADING = re.compile(r"# -{2,} *(\w.*?)[ -]*")  # "# ---- optimisation": a heading among the settings
PLAIN = re.compile(r"[\w./,:-]+")  # text that a shell needs no quotes for


def print_all_text():
    """Let stdout and stderr print every character, as a \\u escape if the encoding (of a Windows console) lacks it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parser_with_examples(make=argparse.ArgumentParser, *args, examples, **settings):
    """An argparse parser, made by make(*args, **settings), whose --help ends with `examples`, a list of commands."""
    text = "\n".join(["examples:", *[f"  {example}" for example in examples]])
    layout = argparse.RawDescriptionHelpFormatter  # argparse would otherwise join the examples' lines
    return make(*args, epilog=text, formatter_class=layout, allow_abbrev=False, **settings)


def module_parser(module, description, examples):
    """The parser of `python -m module`, whose errors are one line; examples: lists of arguments, as text."""
    program = f"python -m {module}"
    commands = [f"{program} {arguments}" for arguments in examples]
    parser = parser_with_examples(prog=program, description=description, examples=commands)
    parser.error = lambda message: sys.exit(f"{module}: {message}")
    return parser


def comments_of(source):
    """The comments that stand behind code, {line: text}, and the headings, {line: text}."""
    behind, headings = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        heading = HEADING.fullmatch(token.string)
        if token.line[:token.start[1]].strip():
            behind[line] = token.string.lstrip("# ")
        elif heading:
            headings[line] = heading[1]
    return behind, headings


def as_argument(value):
    """A setting's value as one would type it after --name=."""
    if isinstance(value, tuple) and value:
        return ",".join(map(str, value)) + "," * (len(value) == 1)
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    return str(value)


def describe(argument, sentence, width):
    """The lines of --help for one setting: the argument and, beside it, the wrapped sentence."""
    left = f"  {argument}"
    lines = textwrap.wrap(sentence, width - COLUMN) or [""]
    if len(left) > COLUMN - 2:
        return [left] + [" " * COLUMN + line for line in lines]
    return [(left.ljust(COLUMN) + lines[0]).rstrip()] + [" " * COLUMN + line for line in lines[1:]]


def help_text(script, source, settings):
    """The text of --help of a script with the text `source`: usage, purpose, examples, and all settings.

    settings: {name: (default, ast node)}; each is shown with its default and its comment.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    paragraphs = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    lines = [f"usage: python {script} [CONFIG.py ...] [--NAME=VALUE ...]"]
    if paragraphs[0]:
        lines += ["", *paragraphs[0].splitlines()]
    examples = next((text for text in paragraphs if text.startswith("    ")), "")
    if examples:
        lines += ["", "examples:", *textwrap.indent(textwrap.dedent(examples), "  ").splitlines()]
    if settings:
        lines += ["", "settings and their defaults; if several arguments set one, the last counts:"]
    behind, headings = comments_of(source)
    done = 0
    for name, (default, node) in settings.items():
        titles = [title for line, title in headings.items() if done < line < node.lineno]
        for title in titles:
            lines += ["", f"{title}:"]
        done = node.lineno
        sentences = [behind[line] for line in range(node.lineno, node.end_lineno + 1) if line in behind]
        lines += describe(f"--{name}={as_argument(default)}", " ".join(sentences), width)
    return "\n".join(lines)
