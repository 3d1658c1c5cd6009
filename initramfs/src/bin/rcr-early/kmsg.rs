//! The kernel's log: the one place that shows what happened before the journal.

use std::io::Write;

/// Longest record; the kernel takes a little more.
const RECORD_BYTES_MAX: usize = 900;

/// The device, and where it is while init-bottom has moved it.
const DEVICES: [&str; 2] = ["/dev/kmsg", "/root/dev/kmsg"];

/// Logs a step.
pub fn info(text: &str) {
    log(6, text);
}

/// Logs a failure.
pub fn warn(text: &str) {
    log(4, text);
}

/// Sends the warnings of libraries to the same place.
pub fn take_warnings() {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(|| Warnings)
        .with_ansi(false)
        .with_target(false)
        .with_level(false)
        .without_time()
        .finish();
    // Only a second call could fail.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Makes a record of each line that a subscriber writes.
struct Warnings;

impl Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        warn(String::from_utf8_lossy(bytes).trim());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Without a log there is nobody to tell that there is no log, so failing is
/// silent. A device opened anew for each line is not rate limited.
fn log(level: u8, text: &str) {
    let record = record(level, text);
    for device in DEVICES {
        if let Ok(mut file) = std::fs::OpenOptions::new().write(true).open(device) {
            let _ = file.write_all(&record);
            return;
        }
    }
}

fn record(level: u8, text: &str) -> Vec<u8> {
    let mut record = format!("<{level}>rcr: ");
    for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if record.len() + c.len_utf8() > RECORD_BYTES_MAX {
            break;
        }
        record.push(c);
    }
    record.push('\n');
    record.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_bounded_line() {
        assert_eq!(record(6, "a\nb"), b"<6>rcr: a b\n");
        let long = record(4, &"ä".repeat(2000));
        assert!(long.len() < 1000);
        assert_eq!(long.iter().filter(|b| **b == b'\n').count(), 1);
    }
}
