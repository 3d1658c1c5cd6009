//! Resource limits (getrlimit(2)).

use std::io;

use crate::image::schema::{RlimitEntry, TaskRlimitsEntry};
use crate::remote::Program;
use crate::sys::text;

/// Reads `/proc/PID/limits`, whose lines are in the order of `RLIMIT_*`.
///
/// prlimit(2) on another user's process would need CAP_SYS_RESOURCE.
pub fn save(pid: i32) -> io::Result<TaskRlimitsEntry> {
    let text = text::read_string(format!("/proc/{pid}/limits"))?;
    parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/limits")))
}

pub(crate) fn parse(text: &str) -> Option<TaskRlimitsEntry> {
    let number = |w: &str| match w {
        "unlimited" => Some(libc::RLIM_INFINITY),
        w => w.parse().ok(),
    };
    let rlimits = text
        .lines()
        .skip(1)
        .map(|line| {
            // The name is padded to 25 columns and contains blanks.
            let mut words = line.get(25..)?.split_ascii_whitespace();
            let (cur, max) = (number(words.next()?)?, number(words.next()?)?);
            Some(RlimitEntry { cur, max })
        })
        .collect::<Option<Vec<_>>>()?;
    Some(TaskRlimitsEntry { rlimits })
}

/// Sets every limit from inside the task.
pub fn restore(p: &mut Program, limits: &TaskRlimitsEntry) {
    for (resource, l) in limits.rlimits.iter().enumerate() {
        let value = p.bytes(&[l.cur, l.max].map(u64::to_le_bytes).concat());
        p.call(
            libc::SYS_prlimit64,
            format!("set resource limit {resource} to {}:{}", l.cur, l.max),
            &[0.into(), (resource as u64).into(), value.into(), 0.into()],
        );
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn agrees_with_getrlimit() {
        let saved = super::save(std::process::id() as i32).unwrap().rlimits;
        let (soft, hard) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(saved.len(), 16);
        assert_eq!((saved[7].cur, saved[7].max), (soft, hard));
    }
}
