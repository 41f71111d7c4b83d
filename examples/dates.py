"""Write a small data set for `nyscaled finetune`: dates in digits, with their months by name."""

# region data
import datetime
import json
import pathlib

first = datetime.date(1990, 1, 1)
days = [first + datetime.timedelta(n * 7919 % 15000) for n in range(370)]
folder = pathlib.Path("dates")
folder.mkdir(exist_ok=True)
for name, part in {"train": days[:300], "dev": days[300:320], "test": days[320:]}.items():
    rows = [{"prompt": f"{d} is", "completion": f" {d.day} {d:%B} {d.year}"} for d in part]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
# endregion data
