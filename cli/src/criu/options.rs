//! The command line, as getopt_long(3) would take it apart: options may stand
//! anywhere, long ones with one dash or two.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Context, bail};

use super::Error;

/// What `--help` prints.
pub const HELP: &str = "\
Usage:
  criu dump|pre-dump -t PID [options]
  criu restore [options]
  criu check [--feature NAME]
  criu lazy-pages [--page-server --address HOST --port PORT]
  criu page-server --port PORT [--address HOST]
  criu cpuinfo dump|check
  criu swrk FD
  criu service [--address PATH]

  -t, --tree PID           checkpoint this process and its descendants
  -D, --images-dir DIR     where the images are (here)
  -W, --work-dir DIR       where logs, pid files and statistics go (the images')
  -o, --log-file FILE      the log; standard error without it
  -v[NUM], --verbosity=NUM 0 nothing, 1 errors, 2 warnings, 3 information, 4 all
  -d, --restore-detached   return when the tree runs
  -S, --restore-sibling    restore as our own sibling
  -s, --leave-stopped      leave the tree stopped
  -R, --leave-running      leave the tree running
  -j, --shell-job          the tree is part of a terminal's session
  -r, --root DIR           root of the restored mount namespace
      --pidfile FILE       write the root process's id there
      --action-script CMD  run CMD at each stage
      --config FILE, --no-default-config
  and the options of criu(8)
";

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Command {
    /// Nothing but say who we are.
    #[default]
    Help,
    Version,
    Dump,
    PreDump,
    Dedup,
    Restore,
    Check,
    CpuinfoDump,
    CpuinfoCheck,
    Service,
    PageServer,
    LazyPages,
    /// RPC over this descriptor.
    Swrk(i32),
    /// A command that we do not offer.
    Other(String),
}

/// All that can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub command: Command,
    pub pid: Option<i32>,
    pub images_dir: Option<PathBuf>,
    pub work_dir: Option<PathBuf>,
    pub log_file: Option<PathBuf>,
    pub verbosity: u8,
    pub pidfile: Option<PathBuf>,
    pub detached: bool,
    pub sibling: bool,
    pub leave_stopped: bool,
    pub leave_running: bool,
    pub timeout: Option<u32>,
    pub tcp_established: bool,
    pub tcp_close: bool,
    pub skip_in_flight: bool,
    pub ext_unix_sk: bool,
    pub ghost_limit: Option<u64>,
    pub display_stats: bool,
    pub status_fd: Option<i32>,
    pub scripts: Vec<OsString>,
    pub features: Vec<String>,
    pub close: Vec<i32>,
    pub config: Option<PathBuf>,
    pub default_config: bool,
    pub cpu_cap: Option<String>,
    pub address: Option<PathBuf>,
    pub port: Option<u16>,
    /// A connected socket to a page server.
    pub page_socket: Option<i32>,
    /// Options by name that need to be looked at by [`super::unsupported`].
    pub named: Vec<(String, Option<OsString>)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            command: Command::default(),
            pid: None,
            images_dir: None,
            work_dir: None,
            log_file: None,
            verbosity: 2,
            pidfile: None,
            detached: false,
            sibling: false,
            leave_stopped: false,
            leave_running: false,
            timeout: None,
            tcp_established: false,
            tcp_close: false,
            skip_in_flight: false,
            ext_unix_sk: false,
            ghost_limit: None,
            display_stats: false,
            status_fd: None,
            scripts: Vec::new(),
            features: Vec::new(),
            close: Vec::new(),
            config: None,
            default_config: true,
            cpu_cap: None,
            address: None,
            port: None,
            page_socket: None,
            named: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    /// Only as `--name=value`.
    Optional,
}
use Takes::{Nothing, Optional, Value};

/// Every long option and the letter it has.
const TABLE: &[(&str, Option<u8>, Takes)] = &[
    ("tree", Some(b't'), Value),
    ("images-dir", Some(b'D'), Value),
    ("work-dir", Some(b'W'), Value),
    ("log-file", Some(b'o'), Value),
    ("verbosity", Some(b'v'), Optional),
    ("version", Some(b'V'), Nothing),
    ("help", Some(b'h'), Nothing),
    ("pidfile", None, Value),
    ("restore-detached", Some(b'd'), Nothing),
    ("daemon", None, Nothing),
    ("restore-sibling", Some(b'S'), Nothing),
    ("leave-stopped", Some(b's'), Nothing),
    ("leave-running", Some(b'R'), Nothing),
    ("shell-job", Some(b'j'), Nothing),
    ("root", Some(b'r'), Value),
    ("libdir", Some(b'L'), Value),
    ("exec-cmd", None, Nothing),
    ("timeout", None, Value),
    ("tcp-established", None, Nothing),
    ("tcp-close", None, Nothing),
    ("skip-in-flight", None, Nothing),
    ("ext-unix-sk", Some(b'x'), Optional),
    ("file-locks", Some(b'l'), Nothing),
    ("link-remap", None, Nothing),
    ("ghost-limit", None, Value),
    ("ghost-fiemap", None, Nothing),
    ("evasive-devices", None, Nothing),
    ("manage-cgroups", None, Optional),
    ("cgroup-root", None, Value),
    ("cgroup-props", None, Value),
    ("cgroup-props-file", None, Value),
    ("cgroup-dump-controller", None, Value),
    ("cgroup-yard", None, Value),
    ("freeze-cgroup", None, Value),
    ("external", None, Value),
    ("inherit-fd", None, Value),
    ("orphan-pts-master", None, Nothing),
    ("join-ns", None, Value),
    ("empty-ns", None, Value),
    ("ext-mount-map", Some(b'M'), Value),
    ("enable-external-sharing", None, Nothing),
    ("enable-external-masters", None, Nothing),
    ("skip-mnt", None, Value),
    ("enable-fs", None, Value),
    ("veth-pair", None, Value),
    ("network-lock", None, Value),
    ("prev-images-dir", None, Value),
    ("track-mem", None, Nothing),
    ("auto-dedup", None, Nothing),
    ("pre-dump-mode", None, Value),
    ("page-server", None, Nothing),
    ("address", None, Value),
    ("port", None, Value),
    ("ps-socket", None, Value),
    ("lazy-pages", None, Nothing),
    ("action-script", None, Value),
    ("status-fd", None, Value),
    ("config", None, Value),
    ("no-default-config", None, Nothing),
    ("cpu-cap", None, Optional),
    ("force-irmap", None, Nothing),
    ("irmap-scan-path", None, Value),
    ("lsm-profile", None, Value),
    ("lsm-mount-context", None, Value),
    ("weak-sysctls", None, Nothing),
    ("deprecated", None, Nothing),
    ("display-stats", None, Nothing),
    ("log-pid", None, Nothing),
    ("close", None, Value),
    ("feature", None, Value),
    ("all", None, Nothing),
    ("extra", None, Nothing),
    ("experimental", None, Nothing),
    ("check-only", None, Nothing),
    ("stream", None, Nothing),
    ("unprivileged", None, Nothing),
    ("mntns-compat-mode", None, Nothing),
    ("file-validation", None, Value),
    ("skip-file-rwx-check", None, Nothing),
    ("allow-uprobes", None, Nothing),
    ("tls", None, Nothing),
    ("tls-cacert", None, Value),
    ("tls-cacrl", None, Value),
    ("tls-cert", None, Value),
    ("tls-key", None, Value),
    ("tls-no-cn-verify", None, Nothing),
];

impl Options {
    /// Takes the arguments in on top of what is set already.
    pub fn parse(&mut self, arguments: &[OsString]) -> Result<(), Error> {
        let mut words: Vec<String> = Vec::new();
        let mut rest = arguments.iter().map(OsString::as_os_str);
        while let Some(argument) = rest.next() {
            let bytes = argument.as_bytes();
            match bytes {
                b"--" => words.extend(rest.by_ref().map(|w| w.to_string_lossy().into_owned())),
                [b'-', b'-', long @ ..] => self.long(long, &mut rest)?,
                [b'-', first, ..] if *first != b'-' => self.dashed(&bytes[1..], &mut rest)?,
                _ => words.push(argument.to_string_lossy().into_owned()),
            }
        }
        self.words(&words)
    }

    /// After one dash: letters, or a long name.
    fn dashed<'a>(
        &mut self,
        text: &'a [u8],
        rest: &mut impl Iterator<Item = &'a OsStr>,
    ) -> Result<(), Error> {
        let name = text.split(|&b| b == b'=').next().unwrap_or(text);
        if name.len() > 1 && find(name).is_some() {
            return self.long(text, rest);
        }
        let mut at = 0;
        while at < text.len() {
            let letter = text[at];
            at += 1;
            let Some(&(name, _, takes)) = TABLE.iter().find(|(_, l, _)| *l == Some(letter)) else {
                bail!("unknown option -{}", letter as char);
            };
            let here = &text[at..];
            if letter == b'v' {
                let digits = here.iter().take_while(|b| b.is_ascii_digit()).count();
                let value = (digits > 0).then(|| OsStr::from_bytes(&here[..digits]));
                self.set(name, value)?;
                at += digits;
                continue;
            }
            match takes {
                Nothing => self.set(name, None)?,
                Value | Optional if !here.is_empty() => {
                    self.set(name, Some(OsStr::from_bytes(here)))?;
                    return Ok(());
                }
                Optional => self.set(name, None)?,
                Value => {
                    let value = rest
                        .next()
                        .with_context(|| format!("option -{} needs a value", letter as char))?;
                    self.set(name, Some(value))?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn long<'a>(
        &mut self,
        text: &'a [u8],
        rest: &mut impl Iterator<Item = &'a OsStr>,
    ) -> Result<(), Error> {
        let mut parts = text.splitn(2, |&b| b == b'=');
        let name = parts.next().unwrap_or_default();
        let value = parts.next().map(OsStr::from_bytes);
        let shown = String::from_utf8_lossy(name).into_owned();
        if let Some(&(name, _, takes)) = find(name) {
            let value = match (takes, value) {
                (Nothing, Some(_)) => bail!("option --{name} takes no value"),
                (Value, None) => Some(
                    rest.next()
                        .with_context(|| format!("option --{name} needs a value"))?,
                ),
                (_, value) => value,
            };
            return self.set(name, value);
        }
        if let Some(positive) = name.strip_prefix(b"no-")
            && let Some(&(name, _, _)) = find(positive)
            && value.is_none()
        {
            return self.unset(name);
        }
        bail!("unknown option --{shown}");
    }

    fn unset(&mut self, name: &str) -> Result<(), Error> {
        match self.flag(name) {
            Some(flag) => *flag = false,
            None => self.named.retain(|(have, _)| have != name),
        }
        Ok(())
    }

    fn flag(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "restore-detached" | "daemon" => &mut self.detached,
            "restore-sibling" => &mut self.sibling,
            "leave-stopped" => &mut self.leave_stopped,
            "leave-running" => &mut self.leave_running,
            "tcp-established" => &mut self.tcp_established,
            "tcp-close" => &mut self.tcp_close,
            "skip-in-flight" => &mut self.skip_in_flight,
            "ext-unix-sk" => &mut self.ext_unix_sk,
            "display-stats" => &mut self.display_stats,
            _ => return None,
        })
    }

    /// Sets one option of the table.
    fn set(&mut self, name: &str, value: Option<&OsStr>) -> Result<(), Error> {
        let text = || value.unwrap_or_default().to_string_lossy().into_owned();
        let path = || Some(PathBuf::from(value.unwrap_or_default()));
        let number = || -> Result<i32, Error> {
            let text = text();
            text.parse()
                .ok()
                .filter(|&n| n >= 0)
                .with_context(|| format!("option --{name}: {text:?} is no number"))
        };
        if let Some(flag) = self.flag(name) {
            *flag = true;
            return Ok(());
        }
        match name {
            "tree" => {
                let pid = number()?;
                if pid == 0 {
                    bail!("option --tree: 0 is no process");
                }
                self.pid = Some(pid);
            }
            "images-dir" => self.images_dir = path(),
            "work-dir" => self.work_dir = path(),
            "log-file" => self.log_file = path(),
            "verbosity" => {
                self.verbosity = match value {
                    Some(_) => number()?.min(9) as u8,
                    None => self.verbosity.saturating_add(1),
                }
            }
            "version" => self.command = Command::Version,
            "help" => self.command = Command::Help,
            "pidfile" => self.pidfile = path(),
            "timeout" => self.timeout = Some(number()? as u32),
            "ghost-limit" => self.ghost_limit = Some(size(&text())?),
            "status-fd" => self.status_fd = Some(number()?),
            "action-script" => self.scripts.push(value.unwrap_or_default().to_owned()),
            "feature" => self.features.push(text()),
            "close" => self.close.push(number()?),
            "config" => self.config = path(),
            "no-default-config" => self.default_config = false,
            "cpu-cap" => {
                let known = ["all", "none", "cpu", "fpu", "ins"];
                let text = value.map_or("all".into(), |_| text());
                if let Some(what) = text.split(',').find(|w| !known.contains(w)) {
                    bail!("option --cpu-cap: {what:?} is not known");
                }
                self.cpu_cap = Some(text);
            }
            "address" => self.address = path(),
            "port" => {
                let port = u16::try_from(number()?).ok();
                self.port = Some(port.with_context(|| format!("option --{name}: no such port"))?);
            }
            "ps-socket" => self.page_socket = Some(number()?),
            _ => self
                .named
                .push((name.to_owned(), value.map(OsStr::to_owned))),
        }
        Ok(())
    }

    fn words(&mut self, words: &[String]) -> Result<(), Error> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let told = matches!(self.command, Command::Version);
        let command = match words[..] {
            [] if told => return Ok(()),
            [] => return Ok(()),
            ["dump"] => Command::Dump,
            ["pre-dump"] => Command::PreDump,
            ["dedup"] => Command::Dedup,
            ["restore"] => Command::Restore,
            ["check"] => Command::Check,
            ["service"] => Command::Service,
            ["cpuinfo", "dump"] => Command::CpuinfoDump,
            ["cpuinfo", "check"] => Command::CpuinfoCheck,
            ["swrk", fd] => Command::Swrk(
                fd.parse()
                    .with_context(|| format!("swrk: {fd:?} is no descriptor"))?,
            ),
            ["page-server"] => Command::PageServer,
            ["lazy-pages"] => Command::LazyPages,
            ["exec"] => Command::Other(words[0].to_owned()),
            [first, ..] => bail!("unknown command: {first}"),
        };
        if !told {
            self.command = command;
        }
        Ok(())
    }

    /// Whether an option was given that has no field of its own.
    pub fn has(&self, name: &str) -> bool {
        self.named.iter().any(|(have, _)| have == name)
    }

    /// The values of an option that has no field of its own.
    pub fn values(&self, name: &str) -> impl Iterator<Item = String> {
        let given = self.named.iter().filter(move |(have, _)| have == name);
        given.filter_map(|(_, value)| Some(value.as_ref()?.to_string_lossy().into_owned()))
    }
}

fn find(name: &[u8]) -> Option<&'static (&'static str, Option<u8>, Takes)> {
    TABLE.iter().find(|(have, ..)| have.as_bytes() == name)
}

/// A number of bytes with K, M or G behind it.
fn size(text: &str) -> Result<u64, Error> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .with_context(|| format!("{text:?} is no size"))?;
    number
        .checked_mul(1 << shift)
        .with_context(|| format!("{text} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, Error> {
        let mut options = Options::default();
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        options.parse(&words)?;
        Ok(options)
    }

    #[test]
    fn spellings_that_scripts_use() {
        let o = parse("dump -t 42 -D /img -vvv -o d.log -R --ghost-limit 2M -W w").unwrap();
        assert_eq!(
            (&o.command, o.pid, o.verbosity),
            (&Command::Dump, Some(42), 5)
        );
        assert_eq!(o.ghost_limit, Some(2 << 20));
        assert!(o.leave_running && !o.leave_stopped);
        assert_eq!(parse("-verbosity=0 check").unwrap().verbosity, 0);
        assert_eq!(parse("--verbosity=4 check").unwrap().verbosity, 4);
        assert_eq!(parse("-v4 restore -dSj").unwrap().verbosity, 4);
        let o = parse("restore -dSD/img --pidfile=p").unwrap();
        assert!(o.detached && o.sibling);
        assert_eq!(o.images_dir, Some("/img".into()));
        assert_eq!(o.pidfile, Some("p".into()));
        let o = parse("restore -d --no-restore-detached --manage-cgroups=soft").unwrap();
        assert!(!o.detached && o.has("manage-cgroups"));
        assert_eq!(parse("--version").unwrap().command, Command::Version);
        assert_eq!(parse("swrk 3").unwrap().command, Command::Swrk(3));
        assert_eq!(parse("cpuinfo dump").unwrap().command, Command::CpuinfoDump);
    }

    #[test]
    fn mistakes_are_told() {
        for line in [
            "dump -t",
            "dump -t x",
            "dump -t 0",
            "dump --tree=-1",
            "dump --nonsense",
            "dump -Q",
            "dump --leave-running=yes",
            "frobnicate",
            "dump --ghost-limit 12x",
            "swrk x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
