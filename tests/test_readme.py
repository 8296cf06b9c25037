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

from support import (ALL, CA, CLIENT, FAST, LISTENING, OWN_WORDS, PATIENCE, PEER, PYTHON, ROOT, Process, Server,
                     TestCase, client_command, copy_project, make, path_with, plain_environment, readme, run, template,
                     temporary_folder, wait_until)

ASIDE = [(r"\(serial [\w…]+, until \w+ [ \d]\d [\d:]+ \d+ GMT\)", "(serial N)"), (r"127\.0\.0\.1:\d+", "HOST:PORT"),
         (r"(?m)^revoked \w+", "revoked N"), (r"\b(?!2 |8 )\d+ bytes$", "N bytes"),
         ("CompressedCertificate", "Certificate"),  # as OpenSSL from 3.2 on may send it
         (r"^< CloseNotify, 2 bytes\n", ""),  # the client does not wait for it, but it may have come
         *((words, f"OpenSSL's words {number}") for number, words in enumerate(OWN_WORDS))]


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
    for match in re.finditer(r"^```console\n(.*?)^```$|^\| (`\./[^\n]*) \|$", text, re.M | re.S):
        number = text[:match.start()].count("\n") + 1
        if match[2]:
            yield number, None, [cell.strip() for cell in match[2].split(" |")][:-1]  # not the reason
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
        self.env.update(PATH=path_with(), PYTHONIOENCODING="utf-8", CA=CA)
        self.server, self.seen, experiments, blocks = None, 0, 0, 0
        try:
            before, _, rest = text.partition("## The scripts in two terminals\n")  # what is before has a test of its own
            for number, lines, cells in steps("\n" * (before.count("\n") + 1) + rest):
                if cells:
                    experiments += 1
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
        self.assertEqual(experiments, 11)
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
        self.seen = self.clients = 0
        self.env["SERVER"] = str(self.server.process.pid)
        if lines[1:] != ["…"]:
            return self.server_says(number + 1, lines[1:])
        self.server.wait_for(LISTENING)
        self.seen = len(self.server.lines)

    def server_says(self, number, shown):
        """Wait for lines of the server as they are shown, after lines of clients of which nothing is shown."""
        def found():
            places = range(self.seen, len(self.server.lines) - len(shown) + 1)
            return next((place for place in places if matches(shown, self.server.lines[place:place + len(shown)])), None)
        with self.server.news:
            self.server.news.wait_for(lambda: found() is not None, PATIENCE / 4)
            if found() is None:
                self.wrong(number, shown, self.server.lines[self.seen:])
            self.seen = found() + len(shown)

    def stop(self):
        """Stop the server."""
        if self.server:
            with self.server:
                # A client may end before the server has said how it went.
                wait_until(lambda: len(re.findall(rf"(?m)^{PEER}(?:answered|turned|hung up)", self.server.log())) >= self.clients)
                self.server.process.send_signal(signal.SIGINT)
                self.assertEqual(self.server.end(), 0)
                # It says how a connection ended a moment before it stops counting it.
                self.assertRegex(self.server.log(), r"\nstopping, connections: [01]\nstopped\n\Z")
                self.assertNotIn("Traceback", self.server.log())
            self.server = None

    def experiment(self, number, cells):
        """Do a row: start the server that it has, run the client, compare the last words of both ends and who refused."""
        command, client_says, server_says = cells
        if command.startswith("`./server_try"):
            self.start(number, ["$ " + command.strip("`"), "…"])
            command = "./client_try $CA auth/client.crt auth/client.key"
        said = shell(command.strip("`"), self.folder, self.env)[1].splitlines()[-1]
        self.clients += 1
        if not matches(["client_try: HOST:PORT: " + client_says], [said]):
            self.wrong(number, [client_says], [said])
        self.assertEqual({said.partition(":")[0] for said in (client_says, server_says)}, {"turned away", "turned us away"})
        self.server_says(number, ["HOST:PORT: " + server_says])

    def commands(self, number, lines):
        starts = [place for place, line in enumerate(lines) if line.startswith("$ ")] + [len(lines)]
        for start, end in zip(starts, starts[1:]):
            command, shown = lines[start][2:], lines[start + 1:end]
            said = shell(command, self.folder, self.env)[1].splitlines()
            self.clients += command.startswith("./client_try")
            if not matches(shown, said):
                self.wrong(number + start + 1, shown, said)

    def test_the_idea_in_thirty_lines(self):
        """The short server and client, with each other and with the scripts, and the experiment with the line taken out."""
        programs = fenced("python", readme())
        self.assertLessEqual(sum(program.count("\n") for program in programs), 30)
        removed = re.search("`sed (/[A-Z_]+/d) short_server.py > open_server.py;", readme())[1]
        folder = shutil.copytree(template(ALL), os.path.join(temporary_folder(), "clone"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        for name, program in zip(("short_server.py", "short_client.py"), programs):
            with open(os.path.join(folder, name), "w") as file:
                file.write(program.replace("6420", port))
        shell(f"sed {removed} short_server.py > open_server.py", folder, plain_environment())

        def ask(*files):
            return run(*client_command(port, files=(CA, *files)), folder=folder)
        for name, stranger in ("short_server.py", (1, "")), ("open_server.py", (0, "42\n")):
            with Process(*PYTHON, "-u", name, folder=folder) as server:
                wait_until(lambda: "refused" not in ask()[2])
                self.assertEqual(run(*PYTHON, "short_client.py", folder=folder)[1], "42\n", server.log())
                self.assertEqual(ask(*CLIENT)[:2], (0, "42\n"))
                self.assertEqual(ask()[:2], stranger)
        with Server(folder=folder) as server:
            with open(os.path.join(folder, "short_client.py"), "w") as file:
                file.write(programs[1].replace("6420", str(server.port)))
            self.assertEqual(run(*PYTHON, "short_client.py", folder=folder)[:2], (0, "42\n"))

    def test_functions_that_are_named_exist(self):
        named = set(re.findall("`([a-z_]+)`", readme().partition("These lines have faults")[2].partition("##")[0]))
        defined = set()
        for script in "server_try", "client_try":
            with open(os.path.join(ROOT, script), encoding="utf-8") as file:
                defined.update(re.findall(r"(?m)^ *def (\w+)", file.read()))
        self.assertLessEqual(named, defined)

    def test_it_takes_half_an_hour(self):
        """By a person's clock: 200 words a minute of prose and 100 of tables and code, 200 characters typed, 10 s to compare."""
        seconds, stop = 0, None
        for section in re.split(r"(?m)^## ", readme()):
            shown = "".join(re.findall(r"(?ms)^```.*?^```$|^\|[^\n]*$", section))
            prose = re.sub(r"(?ms)^```.*?^```$|^\|[^\n]*$", "", section)
            commands = re.findall(r"(?m)^\$ (.*)$|^    (make \S+)|^\| `(\./\w+_try[^`]*)`|`(make [a-z][^`]*|python3 [^`]*|sed [^`]*|\./client_try[^`]*)`", section)
            typed = [max(command, key=len) for command in commands]
            self.assertEqual([command for command in typed if len(command) > 100], [])
            seconds += len(prose.split()) / 200 * 60 + len(shown.split()) / 100 * 60 + sum(map(len, typed)) / 200 * 60 + 10 * len(typed)
            if "You could stop here" in section:
                stop = seconds
        self.assertLess(stop, 20 * 60)
        self.assertLess(seconds, 34 * 60)  # and a minute of waiting: the demo, and the certificates

    def test_demo(self):
        """The first block is what `make demo` prints, in a clone that has no certificates yet."""
        shown, = re.findall(r"(?ms)^```\n(server: .*?)^```$", readme())
        folder = copy_project(os.path.join(temporary_folder(), "clone"))
        said = make(folder, "demo", "PORT=0")
        self.assertLessEqual(said.count("\n"), 19)
        if not matches(shown.splitlines(), said.splitlines()):
            self.fail("README.md shows\n" + shown + "\nbut what is said is\n" + said)

    def test_limits(self):
        """Each document has a ceiling, and its prose fits a terminal."""
        for folder, words, lines in ("", 2400, 300), ("auth", 1800, 220), ("tests", 500, 60):
            text = readme(folder)
            self.assertLessEqual(len(text.split()), words, folder)
            self.assertLessEqual(text.count("\n"), lines, folder)
            prose = re.sub(r"(?ms)^```.*?^```$|^\|[^\n]*$", "", text)
            self.assertEqual([line for line in prose.splitlines() if len(line) > 100], [], folder)
            for row in re.findall(r"(?m)^\|.*", text):
                self.assertLessEqual(row.count(" |"), 4, row)
                self.assertNotIn("\\|", row)


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
        folder = shutil.copytree(template(ALL), os.path.join(temporary_folder(), "clone"))
        make(folder, "client-cert", "NAME=laptop7")
        make(folder, "client-cert", "NAME=laptop8")
        with Server(script=self.apply(fenced("diff", readme())[1]), folder=folder) as server:
            for name, output, says in ("laptop8", "42\n", "answered 1, done"), ("laptop7", "", "turned away: not on the list"):
                files = CA, f"auth/clients/{name}.crt", f"auth/clients/{name}.key"
                self.assertEqual(run(*client_command(server.port, files=files), folder=folder)[1], output)
                server.wait_for(PEER + says)
            self.assertIn("your certificate is good, but not on my list", run(*client_command(server.port))[2])


SSH = """host=${1#root@}; shift
case $* in
"install -d -m 755 "*) mkdir -p "$WORLD/$host$5";;
"chmod 755 "*) chmod 755 "$WORLD/$host$3";;
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
        commands, elsewhere = fenced("sh", readme("auth"))
        for command in commands.splitlines():
            self.shell(command)
        self.assertRegex(self.shell("openssl x509 -noout -subject -in auth/test-ca/test-ca.cert"), "subject=O ?= ?Example Ltd, CN ?= ?Example Ltd CA\n")
        self.shell("cd auth/clients && " + elsewhere)
        self.assertIn("For own1 (own1): auth/clients/own1.crt, ", self.shell("make client-cert NAME=own1"))
        cron = cron_commands()
        unit = dict(re.findall(r"(?m)^(\w+)=(.*)$", fenced("ini", readme("auth"))[0]))
        machine = self.world + "/db1.internal"
        credentials = temporary_folder()
        name, _, path = unit["LoadCredential"].partition(":")
        shutil.copy(machine + path, os.path.join(credentials, name))
        key = machine + path
        os.rename(key, key + ".root")  # the service may not read it
        start = unit["ExecStart"].replace("/opt/", machine + "/opt/").replace("0.0.0.0", "127.0.0.1 --port 0")
        self.assertEqual(unit["Type"], "notify")
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(manager.close)
        manager.bind(os.path.join(credentials, "notify"))
        manager.settimeout(PATIENCE)
        with Process(
                "sh", "-c", f"exec python3 {start}", folder=machine + unit["WorkingDirectory"],
                env=dict(self.env, CREDENTIALS_DIRECTORY=credentials, NOTIFY_SOCKET=os.path.join(credentials, "notify"))) as server:
            self.assertEqual(manager.recv(100), b"READY=1")
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
            os.remove(os.path.join(restored, "auth/test-ca/test-ca.crl"))  # as the page's step 2 leaves it out
            self.assertIn("test-ca.crl is lost: copy the newest here from a server", make(restored, "renew", status=2))
            shutil.copy(machine + "/opt/server_try/test-ca.crl", os.path.join(restored, "auth/test-ca"))
            make(restored, "check")

            self.shell("make revoke NAME=laptop7")
            server.lines.clear()
            self.shell(cron[1])
            server.wait_for("reloaded")
            self.assertIn("turned us away: certificate revoked", self.client(port)[2])
            server.lines.clear()
            os.rename(key + ".root", key)
            self.assertEqual(self.reload(server, machine), 0)
            server.wait_for("reloaded")
            with open(machine + "/opt/server_try/test-ca.crl", "w") as file:
                file.write("junk")
            server.lines.clear()
            self.assertEqual(self.reload(server, machine), 1)
            self.assertEqual(server.lines, [])

    def reload(self, server, machine):
        """Do what systemd does at a reload, step after step until one fails; return that one's status."""
        check, kill = re.findall(r"(?m)^ExecReload=(.*)$", fenced("ini", readme("auth"))[0])
        self.assertTrue(check.startswith("+/opt/"))  # as root, who can read the key
        status, said = shell("python3 " + check[1:].replace("/opt/", machine + "/opt/"), machine + "/opt/server_try", self.env)
        if status == 0:
            self.assertTrue(kill.startswith("/bin/kill "))  # which a shell has, where /bin does not
            status, said = shell(kill[len("/bin/"):].replace("$MAINPID", str(server.process.pid)), machine, self.env)
        return status

    def test_cron_mails_what_goes_wrong(self):
        make(self.home, "server-cert", "NAME=db1.internal", "CA_DAYS=20")
        self.assertRegex(self.shell(cron_commands()[3]), r"(?m)^auth/test-ca/test-ca.cert until .* expires soon$")
        os.unlink(os.path.join(self.home, "auth/test-ca/test-ca.key"))
        self.assertIn("auth/test-ca/test-ca.key is missing, or cannot be read: restore a backup", self.shell(cron_commands()[0]))

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
