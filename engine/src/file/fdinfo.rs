//! `/proc/PID/fdinfo/N`, as far as the kinds of files we carry need it.

mod mark;

pub(crate) use mark::Mark;
use mark::group;

/// What the kernel says about one descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct FdInfo {
    pub pos: u64,
    /// `O_*`, O_CLOEXEC included.
    pub flags: u32,
    pub eventfd_count: Option<u64>,
    /// What no other event counter has; since Linux 5.2.
    pub eventfd_id: Option<u64>,
    /// Since Linux 6.5.
    pub eventfd_semaphore: Option<bool>,
    pub sigmask: Option<u64>,
    pub timer: Option<Timer>,
    pub epoll: Vec<Watched>,
    pub locks: Vec<Lock>,
    /// What an inotify instance watches, or the marks of a fanotify group.
    pub marks: Vec<Mark>,
    /// A fanotify group's flags and those of the files in its events.
    pub fanotify: Option<(u32, u32)>,
    /// What a pidfd stands for: -1 if it is gone, 0 if it is not for us to see.
    pub pid: Option<i32>,
    /// Lines that only one kind of file has, as they are.
    pub others: Vec<(String, String)>,
}

/// A timerfd. Times are `(seconds, nanoseconds)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Timer {
    pub clock: i32,
    pub ticks: u64,
    pub settime_flags: u32,
    pub left: (u64, u64),
    pub interval: (u64, u64),
}

/// One target of an epoll instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Watched {
    pub fd: u32,
    pub events: u32,
    pub data: u64,
    pub pos: u64,
    pub ino: u64,
    pub dev: u64,
}

/// One lock on a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lock {
    /// `POSIX`, `FLOCK`, `OFDLCK`, `LEASE`, …
    pub class: String,
    /// `ADVISORY`; for leases `ACTIVE`, `BREAKING` or `BREAKER`.
    pub state: String,
    pub write: bool,
    pub pid: i32,
    pub start: u64,
    /// `None`: to the end of the file.
    pub end: Option<u64>,
}

impl FdInfo {
    /// Parses the file; the error names the line that makes no sense.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut info = FdInfo::default();
        for line in text.lines() {
            info.line(line)
                .ok_or_else(|| format!("fdinfo line {line:?}"))?;
        }
        Ok(info)
    }

    fn line(&mut self, line: &str) -> Option<()> {
        if let Some(words) = line.strip_prefix("inotify ") {
            self.marks.push(Mark::parse(words)?);
            return Some(());
        }
        if let Some(words) = line.strip_prefix("fanotify ") {
            match group(words) {
                Some(flags) => self.fanotify = Some(flags),
                None => self.marks.push(Mark::parse(words)?),
            }
            return Some(());
        }
        let Some((key, value)) = line.split_once(':') else {
            return Some(());
        };
        let value = value.trim();
        match key {
            "pos" => self.pos = value.parse().ok()?,
            "flags" => self.flags = u32::from_str_radix(value, 8).ok()?,
            "eventfd-count" => self.eventfd_count = Some(hex(value)?),
            "eventfd-id" => self.eventfd_id = Some(value.parse().ok()?),
            "eventfd-semaphore" => self.eventfd_semaphore = Some(value != "0"),
            "sigmask" => self.sigmask = Some(hex(value)?),
            "clockid" => self.timer().clock = value.parse().ok()?,
            "ticks" => self.timer().ticks = value.parse().ok()?,
            "settime flags" => self.timer().settime_flags = u32::from_str_radix(value, 8).ok()?,
            "it_value" => self.timer().left = pair(value)?,
            "it_interval" => self.timer().interval = pair(value)?,
            "tfd" => self.epoll.push(watched(value)?),
            "lock" => self.locks.push(lock(value)?),
            "Pid" => self.pid = Some(value.parse().ok()?),
            _ => self.others.push((key.to_owned(), value.to_owned())),
        }
        Some(())
    }

    /// A line that only one kind of file has.
    pub(crate) fn other(&self, key: &str) -> Option<&str> {
        let found = self.others.iter().find(|(k, _)| k == key);
        found.map(|(_, v)| v.as_str())
    }

    fn timer(&mut self) -> &mut Timer {
        self.timer.get_or_insert_default()
    }
}

fn hex(s: &str) -> Option<u64> {
    u64::from_str_radix(s, 16).ok()
}

/// `(1, 500)`
fn pair(s: &str) -> Option<(u64, u64)> {
    let (a, b) = s.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
    Some((a.parse().ok()?, b.parse().ok()?))
}

/// `5 events:       19 data:                5  pos:0 ino:2a8 sdev:9`
fn watched(s: &str) -> Option<Watched> {
    let spaced = s.replace(':', " ");
    let mut words = spaced.split_whitespace();
    let mut w = Watched {
        fd: words.next()?.parse().ok()?,
        ..Watched::default()
    };
    while let Some(key) = words.next() {
        let value = words.next()?;
        match key {
            "events" => w.events = u32::from_str_radix(value, 16).ok()?,
            "data" => w.data = hex(value)?,
            "pos" => w.pos = value.parse().ok()?,
            "ino" => w.ino = hex(value)?,
            "sdev" => w.dev = hex(value)?,
            _ => {}
        }
    }
    Some(w)
}

/// `1: POSIX  ADVISORY  WRITE 359 00:13:11691 0 EOF`
fn lock(s: &str) -> Option<Lock> {
    let mut words = s.split_whitespace().skip(1);
    let class = words.next()?.to_owned();
    let state = words.next()?.to_owned();
    let write = words.next()?.ends_with("WRITE");
    let pid = words.next()?.parse().ok()?;
    let start = words.nth(1)?.parse().ok()?;
    let end = match words.next()? {
        "EOF" => None,
        n => Some(n.parse().ok()?),
    };
    Some(Lock {
        class,
        state,
        write,
        pid,
        start,
        end,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn epoll_and_locks() {
        let text = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t2061\n\
            tfd:        5 events:       19 data: ffffffff00000005  pos:7 ino:2a8 sdev:9\n\
            lock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF\n\
            lock:\t2: POSIX  ADVISORY  READ  360 00:13:11691 10 19\n";
        let i = FdInfo::parse(text).unwrap();
        assert_eq!(i.flags, 0o2000002);
        let w = Watched {
            fd: 5,
            events: 0x19,
            data: 0xffff_ffff_0000_0005,
            pos: 7,
            ino: 0x2a8,
            dev: 9,
        };
        assert_eq!(i.epoll, [w]);
        assert_eq!(
            (i.locks[0].class.as_str(), i.locks[0].write),
            ("FLOCK", true)
        );
        assert_eq!(
            (i.locks[1].pid, i.locks[1].start, i.locks[1].end),
            (360, 10, Some(19))
        );
    }

    #[test]
    fn timer_signal_and_event() {
        let text = "clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (0, 49406829)\n\
            it_interval: (1, 0)\nsigmask:\t0000000000004002\neventfd-count:               ff\n\
            eventfd-id: 2\neventfd-semaphore: 1\n";
        let i = FdInfo::parse(text).unwrap();
        let t = i.timer.unwrap();
        assert_eq!((t.clock, t.ticks, t.settime_flags), (1, 3, 1));
        assert_eq!((t.left, t.interval), ((0, 49_406_829), (1, 0)));
        assert_eq!(i.sigmask, Some(0x4002));
        assert_eq!(
            (i.eventfd_count, i.eventfd_semaphore),
            (Some(255), Some(true))
        );
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(pos|flags|tfd|lock|it_value)?:?[ -~\n]{0,80}") {
            let _ = FdInfo::parse(&text);
        }
    }
}
