"""Run the tests: each module in a process of its own, three times as many at once as there are processors."""

import concurrent.futures
import os
import re
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def run(module):
    """Run one module's tests; return its name, the exit status and what unittest printed."""
    done = subprocess.run([sys.executable, "-m", "unittest", "-v", module], cwd=HERE, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return module, done.returncode, done.stdout.decode("utf-8", "backslashreplace")


def main():
    modules = sys.argv[1:] or sorted((name[:-3] for name in os.listdir(HERE) if re.match(r"test_\w+\.py$", name)),
                                     key=lambda name: -os.path.getsize(os.path.join(HERE, name + ".py")))
    begun, ran, failed = time.monotonic(), 0, []
    with concurrent.futures.ThreadPoolExecutor(3 * os.cpu_count()) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, module) for module in modules]):
            module, status, said = future.result()
            print(f"{module}\n{said}", flush=True)
            count = re.search(r"(?m)^Ran (\d+) test", said)
            ran += int(count[1]) if count else 0
            if status or not count:
                failed.append(module)
    print(f"Ran {ran} tests in {time.monotonic() - begun:.0f} s")
    sys.exit(f"FAILED in {', '.join(failed)}" if failed or not ran else None)


main()
