"""Run the tests: each module in a process of its own, three times as many at once as there are processors."""

import concurrent.futures
import os
import re
import subprocess
import sys
import time

from support import ALL, MADE, template

LONGEST = ("test_ca_home", "test_ca_records", "test_operation", "test_pair", "test_starts", "test_strangers")  # which begin first
HERE = os.path.dirname(os.path.abspath(__file__))


def run(module):
    """Run one module's tests; return its name, the exit status and what unittest printed."""
    done = subprocess.run([sys.executable, "-m", "unittest", "-v", module], cwd=HERE, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return module, done.returncode, done.stdout.decode("utf-8", "backslashreplace")


def main():
    modules = sys.argv[1:] or sorted((name[:-3] for name in os.listdir(HERE) if re.match(r"test_\w+\.py$", name)),
                                     key=lambda name: (name not in LONGEST, name))
    begun, failed = time.monotonic(), []
    counts = dict.fromkeys(["ran", "failures", "errors", "skipped"], 0)
    os.environ[MADE] = template(ALL)
    with concurrent.futures.ThreadPoolExecutor(3 * os.cpu_count()) as pool:
        futures = [pool.submit(run, module) for module in modules]
        try:
            for future in concurrent.futures.as_completed(futures):
                module, status, said = future.result()
                print(f"{module}\n{said}", flush=True)
                found = dict(re.findall(r"(failures|errors|skipped)=(\d+)", said[said.rfind("\nRan "):]))
                found["ran"] = next(iter(re.findall(r"(?m)^Ran (\d+) test", said)), 0)
                for what in found:
                    counts[what] += int(found[what])
                if status:
                    failed.append(module)
                    counts["errors"] += not found["ran"]
        finally:
            for future in futures:
                future.cancel()  # or Ctrl-C would end these modules, and the next would begin
    bad = counts["failures"] + counts["errors"]
    print(f"{time.monotonic() - begun:.0f} s" + (f"; FAILED in {', '.join(failed)}" if failed else ""))
    print(f"{max(counts['ran'] - bad - counts['skipped'], 0)} passed, {bad} failed, {counts['skipped']} skipped")
    sys.exit(1 if failed or not counts["ran"] else 0)


main()
