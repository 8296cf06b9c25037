"""What the documents show, done in a fresh copy of the project: what is said is what they show.

A console block with a command of ./server_try starts a server, and so does a row of the experiments
that has one; blocks without a command show further lines of that server. In what is shown, … stands
for anything.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import unittest

from support import (ALL, CA, CLIENT, FAST, LISTENING, PATIENCE, PEER, PYTHON, ROOT, TRUSTING, Process, Project,
                     Server, TestCase, client_command, copy_project, make, path_with, plain_environment, readme, run,
                     template, temporary_folder)

ASIDE = [(r"\(serial [\w…]+, until \w+ [ \d]\d [\d:]+ \d+ GMT\)", "(serial N)"), (r"127\.0\.0\.1:\d+", "HOST:PORT"),
         (r"(?m)^revoked \w+", "revoked N"), (r"\b(?!2 |8 )\d+ bytes$", "N bytes"),
         ("CompressedCertificate", "Certificate"),  # as OpenSSL from 3.2 on may send it
         (r"^< CloseNotify, 2 bytes\n", ""),  # the client does not wait for it, but it may have come
         # OpenSSL's words change with its version.
         ("self signed", "self-signed"), ("unsupported certificate purpose", "unsuitable certificate purpose"),
         (" or the system clock is incorrect", "")]


def fenced(kind, text):
    """Return the blocks of one kind, without their fences."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S)


def cron_commands():
    """Return the commands of the cron lines, as cron hands them to a shell."""
    return [re.sub(r"^(\S+ +){5}", "", line).replace(r"\%", "%") for line in fenced("cron", readme("auth"))[0].splitlines()]


def shell(command, folder, env):
    """Run a command; return its exit status and what it says."""
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    return done.returncode, done.stdout.decode("utf-8", "backslashreplace")


def steps(text):
    """Yield what to do in turn: the number of the first line, and lines of a console block or cells of an experiment."""
    for match in re.finditer(r"^```console\n(.*?)^```$|^\| (\d+ \|[^\n]*) \|$", text, re.M | re.S):
        number = text[:match.start()].count("\n") + 1
        if match[2]:
            yield number, None, [cell.strip().replace(r"\|", "|") for cell in match[2].split(" |")][:-1]  # not the reason
            continue
        number += 1
        for part in re.split(r"(?m)^(?=\$ \./server_try)", match[1]):
            if part:
                yield number, part.splitlines(), None
            number += part.count("\n")


def matches(shown, said):
    """Tell whether lines are as shown; … stands for any text, alone on a line for any lines."""
    def aside(lines):
        text = "\n".join(lines) + "\n"
        for pattern, name in ASIDE:
            text = re.sub("(?m)" + pattern.replace("(?m)", ""), name, text)
        return text
    pattern = re.escape(aside(shown)).replace("\\\n", "\n").replace("\\…", "…")
    pattern = re.sub(r"(?m)^…\n", r"(?:.*\\n)*", pattern).replace("…", ".*")
    return re.fullmatch(pattern, aside(said)) is not None


class Lesson(TestCase):
    def test_console_blocks_and_experiments(self):
        self.folder = shutil.copytree(template(ALL), os.path.join(temporary_folder(), "clone"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        for name in "server_try", "client_try", "README.md":
            path = os.path.join(self.folder, name)
            with open(path, encoding="utf-8") as file:
                text = file.read().replace("6420", port)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        self.env = plain_environment()
        self.env.update(PATH=path_with(), PYTHONIOENCODING="utf-8")
        self.server, self.seen, experiments, blocks = None, 0, 0, 0
        try:
            for number, lines, cells in steps(text):
                if cells:
                    experiments += 1
                    self.assertEqual(int(cells[0]), experiments)
                    self.experiment(number, cells)
                    continue
                blocks += 1
                if lines[0].startswith("$ ./server_try"):
                    self.start(number, lines)
                elif lines[0].startswith("$ "):
                    self.commands(number, lines)
                else:
                    self.server_says(number, lines)
            self.stop()
        finally:
            if self.server:
                self.server.__exit__()
        self.assertEqual(experiments, 17)
        self.assertEqual(blocks, 9)

    def wrong(self, number, shown, said):
        """Fail, and name the first line of the README that is not what is said."""
        for one, other in zip(shown, said):
            if one == "…" or not matches([one], [other]):
                break
            number += 1
        self.fail(f"README.md:{number}: shows\n" + "\n".join(shown) + "\n\nbut what is said is\n" + "\n".join(said))

    def start(self, number, lines):
        """Start a server; … stands for what it says at every start."""
        self.stop()
        self.server = Process("sh", "-c", "exec " + lines[0][2:], folder=self.folder, env=self.env)
        self.seen = 0
        self.env["SERVER"] = str(self.server.process.pid)
        if lines[1:] != ["…"]:
            return self.server_says(number + 1, lines[1:])
        self.server.wait_for(TRUSTING)
        if len(lines[0].split()) < 4:
            self.server.wait_for("no certificate: every handshake will fail")
        self.seen = len(self.server.lines)

    def server_says(self, number, shown):
        """Wait for as many lines of the server as are shown, and compare them."""
        with self.server.news:
            self.server.news.wait_for(lambda: len(self.server.lines) >= self.seen + len(shown), PATIENCE / 4)
            said = self.server.lines[self.seen:self.seen + len(shown)]
        self.seen += len(shown)
        # Of two connections the lines may come in either order.
        if not matches(sorted(shown), sorted(said)):
            self.wrong(number, shown, said)

    def stop(self):
        """Stop the server; it must have said no more than the README showed."""
        if self.server:
            with self.server:
                self.server.process.send_signal(signal.SIGINT)
                self.assertEqual(self.server.end(), 0)
                # It says how a connection ended a moment before it stops counting it.
                self.assertRegex("\n".join(self.server.lines[self.seen:]), r"\Astopping, connections: [01] \(any .*\)\nstopped\n\Z")
            self.server = None

    def experiment(self, number, cells):
        """Do a row: start the server that it has, run the client, compare the last words of both ends and who refused."""
        *start, command, who, client_says, server_says = cells[1:]
        if start and start[0] != "the same":
            self.start(number, ["$ " + start[0].strip("`"), "…"])
        said = shell(command.strip("`"), self.folder, self.env)[1].splitlines()[-1]
        if not any(matches([prefix + client_says], [said]) for prefix in ("client_try: HOST:PORT: ", "client_try: ", "")):
            self.wrong(number, [client_says], [said])
        refuser = {"turned us away": "server", "turned away": "client"}.get(client_says.partition(":")[0], who)
        self.assertEqual(who, refuser, f"README.md:{number}")
        if server_says:
            shown = ["HOST:PORT: " + server_says]
            if server_says.startswith("answered"):
                shown.insert(0, "HOST:PORT: accepted …")
            self.server_says(number, shown)

    def commands(self, number, lines):
        starts = [place for place, line in enumerate(lines) if line.startswith("$ ")] + [len(lines)]
        for start, end in zip(starts, starts[1:]):
            command, shown = lines[start][2:], lines[start + 1:end]
            said = shell(command, self.folder, self.env)[1].splitlines()
            if not matches(shown, said):
                self.wrong(number + start + 1, shown, said)

    def test_quotation_of_make_context(self):
        quoted, = fenced("python", readme())
        for script in "server_try", "client_try":
            with open(os.path.join(ROOT, script), encoding="utf-8") as file:
                rest = file.read().partition("def make_context(")[2].partition("\ndef ")[0]
            for line in quoted.splitlines():
                self.assertIn("\n" + line + "\n", rest, script)
                rest = "\n" + rest.partition("\n" + line + "\n")[2]

    def test_demo(self):
        """The first block is what `make demo` prints, in a clone that has no certificates yet."""
        shown, = re.findall(r"(?ms)^```\n(server: .*?)^```$", readme())
        folder = copy_project(os.path.join(temporary_folder(), "clone"))
        said = make(folder, "demo", "PORT=0")
        self.assertLessEqual(said.count("\n"), 18)
        if not matches(shown.splitlines(), said.splitlines()):
            self.fail("README.md shows\n" + shown + "\nbut what is said is\n" + said)

    def test_limits(self):
        """Each document has a ceiling, and its prose fits a terminal."""
        for folder, words, lines in ("", 2700, 300), ("auth", 1600, 200), ("tests", 500, 60):
            text = readme(folder)
            self.assertLessEqual(len(text.split()), words, folder)
            self.assertLessEqual(text.count("\n"), lines, folder)
            prose = re.sub(r"(?ms)^```.*?^```$|^\|[^\n]*$", "", text)
            self.assertEqual([line for line in prose.splitlines() if len(line) > 100], [], folder)


class MakeItYours(TestCase):
    """The diffs, applied to copies of the scripts, and used."""

    def apply(self, diff):
        """Apply a diff to a copy, wherever its lines are; return the path of the changed script."""
        folder = temporary_folder()
        source, target = re.search(r"^--- (\w+)\n\+\+\+ ([\w.]+)\n", diff).groups()
        with open(os.path.join(ROOT, source), encoding="utf-8") as file:
            text = "\n" + file.read()
        for hunk in re.split(r"(?m)^@@ .*\n", diff)[1:]:
            old, new = ("\n" + "".join(line[1:] or "\n" for line in hunk.splitlines(True) if line[0] in " \n" + sign) for sign in "-+")
            self.assertEqual(text.count(old), 1, old)
            text = text.replace(old, new)
        path = os.path.join(folder, target)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text[1:])
        if shutil.which("patch"):
            shutil.copy(os.path.join(ROOT, source), folder + "/original")
            done = subprocess.run(["patch", "-o", folder + "/patched", folder + "/original"], input=diff.encode(), stdout=subprocess.PIPE)
            with open(folder + "/patched", encoding="utf-8") as file:
                self.assertEqual(file.read(), text[1:])
            self.assertEqual(done.returncode, 0)
        return path

    def test_another_protocol(self):
        script = self.apply(fenced("diff", readme())[0])
        with Server(script=script) as server:
            status, output, _ = run(*client_command(server.port, "-n", "1", "-n", "15"))
            self.assertEqual(status, 0)
            self.assertRegex(output, r"\A\d+\n\d+\n\Z")
            self.assertIn("error: not 1, 5 or 15 minutes", run(*client_command(server.port, "-n", "2"))[2])

    def test_only_some_clients(self):
        make(Project.get(), "client-cert", "NAME=laptop7")
        make(Project.get(), "client-cert", "NAME=laptop9")
        with Server(script=self.apply(fenced("diff", readme())[1])) as server:
            for name, output, says in ("laptop7", "42\n", "answered 1, done"), ("laptop9", "", "turned away: not on the list"):
                files = CA, f"auth/clients/{name}.crt", f"auth/clients/{name}.key"
                self.assertEqual(run(*client_command(server.port, files=files))[1], output)
                server.wait_for(PEER + says)
            self.assertIn("your certificate is good, but not on my list", run(*client_command(server.port))[2])

    def test_client_as_a_function(self):
        program = """
from add_one import add_one
print(add_one(41, "localhost", *{files!r}, port={port}))
try:
    add_one(41, "localhost", {files[0]!r}, port={port})
except (OSError, ValueError) as error:
    print(error)
"""
        folder = os.path.dirname(self.apply(fenced("diff", readme())[2]))
        with Server() as server:
            files = [os.path.join(Project.get(), name) for name in (CA, *CLIENT)]
            status, output, errors = run(*PYTHON, "-c", program.format(files=files, port=server.port), folder=folder)
            self.assertEqual((status, output), (0, "42\nturned us away: certificate required\n"), errors)


SSH = """host=${1#root@}; shift
case $* in
"mkdir -p "*) mkdir -p "$WORLD/$host$3";;
"systemctl reload server_try") kill -HUP "$(cat "$WORLD/pid")";;
*) exit 1;;
esac
"""
SCP = """while test $# -gt 1; do case $1 in -*) ;; *) files="$files $1";; esac; shift; done
host=${1#root@}
cp -p $files "$WORLD/${host%%:*}${1#*:}"
"""


class Operator(TestCase):
    """The commands, unit and cron lines of the operator's page; ssh and scp here lead to folders of this machine."""

    def setUp(self):
        self.world, self.home = temporary_folder(), copy_project(os.path.join(temporary_folder(), "ca"))
        self.backup = temporary_folder()
        with open(os.path.join(self.home, "Makefile")) as file:
            text = file.read()
        with open(os.path.join(self.home, "Makefile"), "w") as file:
            file.write(text.replace("NEWKEY = rsa:2048", FAST))
        self.env = dict(plain_environment(), PATH=path_with(ssh=SSH, scp=SCP), WORLD=self.world)

    def shell(self, command):
        """Run a command at the CA's home, which must succeed; return what it says."""
        command = command.replace("/srv/ca", self.home).replace("/media/backup", self.backup)
        status, said = shell(command, self.home, self.env)
        self.assertEqual(status, 0, command + "\n" + said)
        return said

    def client(self, port):
        """Run the client on its machine as the page has it, but for the address; return status, output and errors."""
        files = re.search(r"(?m)^    \./client_try --host db1\.internal (.*)$", readme("auth"))[1].split()
        return run(*PYTHON, "client_try", "--host", "127.0.0.1", "--server-name", "db1.internal", "--port", str(port), *files,
                   folder=self.world + "/laptop7/opt/client_try")

    def test_page(self):
        commands, = fenced("sh", readme("auth"))
        for command in commands.splitlines():
            self.shell(command)
        cron = cron_commands()
        unit = dict(re.findall(r"(?m)^(\w+)=(.*)$", fenced("ini", readme("auth"))[0]))
        machine = self.world + "/db1.internal"
        credentials = temporary_folder()
        name, _, path = unit["LoadCredential"].partition(":")
        shutil.copy(machine + path, os.path.join(credentials, name))
        os.unlink(machine + path)  # the service may not read it
        start = unit["ExecStart"].replace("/opt/", machine + "/opt/").replace("0.0.0.0", "127.0.0.1 --port 0")
        check = unit["ExecStartPre"].replace("/opt/", machine + "/opt/")
        status, said = shell(f"python3 {check}", machine + unit["WorkingDirectory"], dict(self.env, CREDENTIALS_DIRECTORY=credentials))
        self.assertEqual(status, 0, said)
        with Process("sh", "-c", f"exec python3 {start}", folder=machine + unit["WorkingDirectory"],
                     env=dict(self.env, CREDENTIALS_DIRECTORY=credentials)) as server:
            port = int(server.wait_for(LISTENING)[1])
            with open(os.path.join(self.world, "pid"), "w") as file:
                file.write(str(server.process.pid))
            self.assertEqual(self.client(port)[:2], (0, "42\n"))
            before = re.search(r"CN=db1.internal, OU=Server, O=Example Ltd \(serial (\w+)", self.client(port)[2])[1]
            for line in cron:
                self.assertEqual(self.shell(line), "")  # or cron would send mail
            server.wait_for("reloaded")
            status, output, errors = self.client(port)
            self.assertEqual((status, output), (0, "42\n"), errors)
            self.assertNotIn(f"serial {before},", errors)

            archive, = os.listdir(self.backup)
            self.assertEqual(os.stat(os.path.join(self.backup, archive)).st_mode & 0o77, 0)
            restored = copy_project(os.path.join(temporary_folder(), "restored"))
            subprocess.run(["tar", "-xzf", os.path.join(self.backup, archive)], cwd=restored, check=True)
            self.assertEqual(make(restored, "list"), make(self.home, "list"))

            self.shell("make revoke NAME=laptop7")
            server.lines.clear()
            self.shell(cron[1])
            server.wait_for("reloaded")
            self.assertIn("turned us away: certificate revoked", self.client(port)[2])
            server.lines.clear()
            command, _, arguments = unit["ExecReload"].partition("/bin/")[2].partition(" ")
            self.assertEqual(command, "kill")  # which a shell has, where /bin does not
            self.shell(f"kill {arguments}".replace("$MAINPID", str(server.process.pid)))
            server.wait_for("reloaded")

    def test_cron_mails_what_goes_wrong(self):
        make(self.home, "server-cert", "NAME=db1.internal", "CA_DAYS=20")
        self.assertRegex(self.shell(cron_commands()[3]), r"(?m)^auth/test-ca/test-ca.cert until .* expires soon$")
        os.unlink(os.path.join(self.home, "auth/test-ca/test-ca.key"))
        self.assertIn("NOT renewed", self.shell(cron_commands()[0]))

    def test_unit(self):
        if not shutil.which("systemd-analyze"):
            self.skipTest("systemd-analyze is not installed")
        path = os.path.join(temporary_folder(), "server_try.service")
        with open(path, "w") as file:
            script = shutil.copy(os.path.join(ROOT, "server_try"), os.path.dirname(path))  # in a path without spaces
            file.write(fenced("ini", readme("auth"))[0].replace("/opt/server_try/server_try", script))
        status, output, errors = run("systemd-analyze", "verify", path)
        self.assertEqual([line for line in (output + errors).splitlines() if "server_try" in line], [])
        self.assertEqual(status, 0, errors)


if __name__ == "__main__":
    unittest.main()
