//! The criu front as people's scripts call it, and what it is tried on.

// Each test program uses its part.
#![allow(dead_code)]

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The front with a line of arguments, in a directory that is its home too.
pub fn command(dir: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rcr"));
    command
        .arg("criu")
        .args(line.split_whitespace())
        .current_dir(dir)
        .env("HOME", dir)
        .env_remove("CRIU_CONFIG_FILE");
    command
}

/// Runs it.
pub fn criu(dir: &Path, line: &str) -> Output {
    command(dir, line).output().unwrap()
}

/// Runs it, which has to go well.
pub fn done(dir: &Path, line: &str) -> String {
    let out = criu(dir, line);
    let said = text(&out.stderr);
    assert!(out.status.success(), "{line}: {}: {said}", out.status);
    said
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether this user may dump; says so if not.
pub fn may_dump() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("not as this user: dumping needs root");
    }
    root
}

/// Waits until it holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "it does not come about: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pipe whose end for writing is inherited; its number.
pub fn inherited_pipe() -> (OwnedFd, OwnedFd, i32) {
    let (r, w) = nix::unistd::pipe().unwrap();
    let number = w.as_raw_fd();
    (r, w, number)
}

/// Runs a script without any descriptor that leads elsewhere: whoever runs the
/// tests may leave some open.
fn alone(program: &str) -> Child {
    let mut command = Command::new("setsid");
    let close = "for f in /proc/$$/fd/*; do n=${f##*/}; \
                 if [ $n -gt 2 ]; then eval \"exec $n>&-\"; fi; done; exec ";
    command.args(["bash", "-c", &format!("{close}{program}")]);
    for set in [Command::stdin, Command::stdout, Command::stderr] {
        set(&mut command, Stdio::null());
    }
    command.spawn().unwrap()
}

fn becomes(child: &Child, name: &str) {
    let comm = format!("/proc/{}/comm", child.id());
    let is = || fs::read_to_string(&comm).unwrap().trim() == name;
    until(name, is);
}

/// A process in vfork(2) whose child sleeps.
pub fn vforker(dir: &Path) -> Child {
    let script = dir.join("vforker.pl");
    // clone(CLONE_VFORK | SIGCHLD), with the memory copied.
    fs::write(
        &script,
        "syscall(56, 0x4011, 0, 0, 0, 0); sleep 1000 while 1;",
    )
    .unwrap();
    alone(&format!("perl {}", script.display()))
}

/// The letter of its state, `proc_pid_stat(5)`.
pub fn state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.chars().next().unwrap()
}

/// Waits for the stop of job control.
pub fn becomes_stopped(pid: i32) {
    until("a stop", || state(pid) == 'T');
}

/// Who traces it; 0: nobody.
pub fn tracer(pid: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("TracerPid:"));
    line.unwrap().trim().parse().unwrap()
}

/// Kills a process and its children.
pub fn end_tree(pid: i32) {
    let children = format!("/proc/{pid}/task/{pid}/children");
    for child in fs::read_to_string(children).unwrap().split_whitespace() {
        let _ = kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGKILL);
    }
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// A control group of version 2, removed when dropped.
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// `None` where there are none to be made.
    pub fn make(name: &str) -> Option<Self> {
        let tops = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let top = tops
            .iter()
            .find(|t| t.join("cgroup.controllers").exists())?;
        let path = top.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        path.join("cgroup.freeze").exists().then_some(Self(path))
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    pub fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    pub fn freeze(&self, frozen: bool) {
        fs::write(self.0.join("cgroup.freeze"), if frozen { "1" } else { "0" }).unwrap();
        until("the freezer", || self.is_frozen() == frozen);
    }

    pub fn is_frozen(&self) -> bool {
        let events = fs::read_to_string(self.0.join("cgroup.events")).unwrap();
        events.lines().any(|l| l == "frozen 1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let end = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A process that sleeps, ended when dropped.
pub struct Sleeper(pub Child);

impl Sleeper {
    pub fn new() -> Self {
        let sleeper = Self(alone("sleep 1000"));
        becomes(&sleeper.0, "sleep");
        sleeper
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn sleeps(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process with 16 MiB of memory that it knows; asked by a signal, it says
/// whether it still has them.
pub struct Holder {
    child: Child,
    told: PathBuf,
}

/// Says how much of its memory is as it was, and how often it was asked.
const HOLDER: &str = r#"
my ($out) = @ARGV;
my $n = 1 << 18;
my @parts = map { my $k = $_; pack("Q<*", map { ($k << 40) + $_ * 2654435761 } 0 .. 8191) } 0 .. 255;
my ($asked, $due) = (0, 1);
$SIG{USR1} = sub { $asked++; $due = 1 };
$SIG{USR2} = sub { substr($parts[7], 4096 * $_, 8) = pack("Q<", 1) for 0 .. 3; };
while (1) {
    if ($due) {
        $due = 0;
        my ($sum, $bytes) = (0, 0);
        for (@parts) { $sum = ($sum * 31 + unpack("%32Q<*", $_)) % 4294967296; $bytes += length }
        open(my $f, ">", "$out.new") or die;
        print $f "$asked $bytes $sum\n";
        close($f);
        rename("$out.new", $out);
    }
    select(undef, undef, undef, 0.01);
}
"#;

impl Holder {
    /// One that is ready. It writes into `dir`.
    pub fn new(dir: &Path) -> Self {
        let script = dir.join("holder.pl");
        fs::write(&script, HOLDER).unwrap();
        let told = dir.join("told");
        let line = format!("perl {} {}", script.display(), told.display());
        let holder = Self {
            child: alone(&line),
            told,
        };
        until("the holder's memory", || holder.told.exists());
        holder
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// What it says of its memory, newly asked.
    pub fn asked(&self) -> String {
        let asked = |text: &str| text.split(' ').next().unwrap().parse::<u64>().unwrap();
        let before = asked(&fs::read_to_string(&self.told).unwrap());
        kill(Pid::from_raw(self.pid()), Signal::SIGUSR1).unwrap();
        let mut said = String::new();
        until("the holder's answer", || {
            said = fs::read_to_string(&self.told).unwrap();
            asked(&said) > before
        });
        let (_, memory) = said.trim().split_once(' ').unwrap();
        memory.to_owned()
    }

    /// It changes a little.
    pub fn change(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGUSR2).unwrap();
        self.asked();
    }

    /// Ends it where it was restored as the child of another.
    pub fn end_of_another(&self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL).unwrap();
    }

    /// Waits for its end. It is our child, also when it was restored as one.
    pub fn ended(&self) -> WaitStatus {
        waitpid(Pid::from_raw(self.pid()), None).unwrap()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.pid());
        // Gone already if all went well.
        let _ = kill(pid, Signal::SIGKILL);
        let _ = waitpid(pid, None);
    }
}
