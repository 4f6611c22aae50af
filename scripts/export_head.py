"""Take a draft head to another engine, or one from elsewhere into this package.

    python scripts/export_head.py --head runs/mine/head --to vllm --out runs/mine/vllm
    python scripts/export_head.py --head runs/mine/head --to sglang --out x --push me/my-head
    python scripts/export_head.py --from eagle --head OWNER/NAME --target vicuna-7b --out runs/x

Layouts: eagle, sglang (also SpecForge), vllm, speculators. A card (README.md) with figures, licence
and the commands to serve goes with every export. Heads in any layout are measured without
importing them: eval/speedup.py --head FOLDER-OR-ID.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from adaspec_eagle.errors import UserError, command_line, run_main
from adaspec_eagle.export import check_free, export_head, import_head
from adaspec_eagle.formats import FORMATS
from adaspec_eagle.storage import check_push, push_folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = command_line(__doc__)
    add = made.add_argument
    add("--head", required=True, metavar="DIR|ID", help="the head: a folder or a hub id")
    way = made.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", choices=FORMATS, help="write the head for this engine")
    way.add_argument("--from", dest="source", choices=FORMATS, help="read it from this layout")
    add("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    add("--target", help="alias, hub id or folder, by which readers shall find it, too; default: "
        "the one that the head names")  # fmt: skip
    add("--target-licence", metavar="TEXT", help="for the card; default: the target's own card's")
    add("--result", type=Path, metavar="FILE", help="result.json of eval/speedup.py, for the card")
    add("--push", metavar="REPO", help="upload the export to the hub as OWNER/NAME")
    add(
        "--dry-run",
        action="store_true",
        help="with --push: say what would be uploaded, keep nothing",
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Export or import; the last line of stdout names the folder, if one was made."""
    args = parser().parse_args(argv)
    if args.dry_run and not args.push:
        raise UserError("--dry-run says what --push REPO would upload: give that, too")
    if args.source:
        if args.push or args.result or args.target_licence:
            raise UserError(
                "--push, --result and --target-licence go with --to: a head from elsewhere gets no "
                "card and is not published here"
            )
        print(f"head: {import_head(args.head, args.source, args.out, args.target)}")
        return 0
    if args.push:
        check_push(args.push, log_in=not args.dry_run)
    export = partial(
        export_head, args.head, args.to, target=args.target, licence=args.target_licence,
        result=args.result, where=args.push,
    )  # fmt: skip
    if args.dry_run:
        check_free(args.out)
        with TemporaryDirectory() as folder:
            made = sorted(export(out=Path(folder) / "head").iterdir())
            sizes = [f"{p.name} ({p.stat().st_size:,} bytes)" for p in made]
        print(f"would upload to {args.push}: {', '.join(sizes)}")
        return 0
    out = export(out=args.out)
    if args.push:
        try:
            print(f"uploaded: {push_folder(out, args.push)}")
        except UserError as error:
            again = f"hf upload {args.push} {out}"
            raise UserError(f"{error}; the export is whole, in {out}: `{again}`") from error
    print(f"head: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
