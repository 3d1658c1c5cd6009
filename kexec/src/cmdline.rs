//! Kernel command lines.

/// An argument of ours: the init that the hand-over replaced.
const ADMIN_INIT: &str = "rcr.init=";
/// Where an init of ours lies.
const OUR_INIT_DIR: &str = "/run/rcr/";
/// Names every argument of ours.
const OUR_PREFIX: &str = "rcr.";

/// The running kernel's command line, ready to be used for another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    kernel: Vec<String>,
    init_arguments: Vec<String>,
    admin_init: Option<String>,
}

impl CommandLine {
    /// Takes a command line without what belongs to its boot alone: the boot
    /// loader's `BOOT_IMAGE=` and `initrd=`, our own `rcr.*`, and `init=`, which is
    /// kept aside (see [`CommandLine::admin_init`]).
    pub fn reuse(text: &str) -> CommandLine {
        let mut line = CommandLine {
            kernel: Vec::new(),
            init_arguments: Vec::new(),
            admin_init: None,
        };
        let mut arguments = split(text).into_iter();
        for argument in arguments.by_ref() {
            if argument == "--" {
                break;
            } else if let Some(init) = argument.strip_prefix(ADMIN_INIT) {
                line.admin_init = Some(init.to_owned());
            } else if let Some(init) = argument.strip_prefix("init=") {
                if !init.starts_with(OUR_INIT_DIR) {
                    line.admin_init = Some(init.to_owned());
                }
            } else if !["BOOT_IMAGE=", "initrd=", OUR_PREFIX]
                .iter()
                .any(|prefix| argument.starts_with(prefix))
            {
                line.kernel.push(argument);
            }
        }
        line.init_arguments = arguments.collect();
        line
    }

    /// The init that the administrator asked for with `init=`, now or before an
    /// earlier hand-over.
    pub fn admin_init(&self) -> Option<&str> {
        self.admin_init.as_deref()
    }

    /// Adds one argument for the kernel unless it is there.
    pub fn push(&mut self, argument: impl Into<String>) {
        let argument = argument.into();
        if !self.kernel.contains(&argument) {
            self.kernel.push(argument);
        }
    }

    /// The text, with `init` as the first program of user space if given; the
    /// administrator's own is then remembered in `rcr.init=`.
    pub fn to_text(&self, init: Option<&str>) -> String {
        let mut arguments = self.kernel.clone();
        match (init, &self.admin_init) {
            (Some(init), admin) => {
                arguments.push(format!("init={init}"));
                arguments.extend(admin.iter().map(|admin| format!("{ADMIN_INIT}{admin}")));
            }
            (None, Some(admin)) => arguments.push(format!("init={admin}")),
            (None, None) => {}
        }
        if !self.init_arguments.is_empty() {
            arguments.push("--".to_owned());
            arguments.extend(self.init_arguments.iter().cloned());
        }
        arguments.join(" ")
    }
}

/// The administrator's init that a hand-over's command line remembers, for the
/// program that takes its place.
pub fn remembered_init(text: &str) -> Option<String> {
    split(text)
        .into_iter()
        .find_map(|a| a.strip_prefix(ADMIN_INIT).map(str::to_owned))
}

/// The arguments as the kernel splits them: by blanks outside double quotes.
fn split(text: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut current = String::new();
    let mut quoted = false;
    for c in text.chars() {
        if c == '"' {
            quoted = !quoted;
        }
        if c.is_ascii_whitespace() && !quoted {
            if !current.is_empty() {
                arguments.push(std::mem::take(&mut current));
            }
        } else {
            current.push(c);
        }
    }
    if !current.is_empty() {
        arguments.push(current);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_belongs_to_one_boot_is_dropped() {
        let line = CommandLine::reuse(
            "BOOT_IMAGE=/boot/vmlinuz-6.12 root=UUID=12 ro quiet initrd=\\initrd rcr.nonce=1\n",
        );
        assert_eq!(line.to_text(None), "root=UUID=12 ro quiet");
        let text = line.to_text(Some("/run/rcr/boot/init"));
        assert_eq!(text, "root=UUID=12 ro quiet init=/run/rcr/boot/init");
        assert_eq!(CommandLine::reuse(&text), line);
    }

    #[test]
    fn an_administrators_init_survives_the_chain() {
        let mut line = CommandLine::reuse("ro init=/sbin/other -- single");
        line.push("dyndbg=\"file x +p\"");
        line.push("ro");
        let text = line.to_text(Some("/run/rcr/boot/init"));
        assert_eq!(
            text,
            "ro dyndbg=\"file x +p\" init=/run/rcr/boot/init rcr.init=/sbin/other -- single"
        );
        assert_eq!(remembered_init(&text).as_deref(), Some("/sbin/other"));
        let again = CommandLine::reuse(&text);
        assert_eq!(again.admin_init(), Some("/sbin/other"));
        assert_eq!(again.to_text(Some("/run/rcr/boot/init")), text);
        assert_eq!(
            again.to_text(None),
            "ro dyndbg=\"file x +p\" init=/sbin/other -- single"
        );
    }

    proptest! {
        #[test]
        fn reusing_twice_is_reusing_once(text in "[a-z=\" ./-]{0,80}") {
            let once = CommandLine::reuse(&text);
            prop_assert_eq!(CommandLine::reuse(&once.to_text(None)).to_text(None), once.to_text(None));
        }
    }
}
