//! What `rcr-upgrade` is asked to do.

use std::path::PathBuf;

use clap::Parser;

use super::fault::FailAt;
use crate::exit::EXIT_HELP;

/// Not worth a further round.
const BLACKOUT_BUDGET_MS: u64 = 100;

/// Boots another kernel and carries the tagged services across.
#[derive(Debug, Clone, Parser)]
#[command(name = "rcr-upgrade", version, after_help = EXIT_HELP)]
pub struct Options {
    /// The kernel to boot (/boot/vmlinuz-VERSION)
    #[arg(long, value_name = "VMLINUZ", required_unless_present_any = ["pre_kexec", "gate"])]
    pub kernel: Option<PathBuf>,

    /// Its initrd [default: /boot/initrd.img-VERSION or /boot/initramfs-VERSION.img]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Append this to the running kernel's command line
    #[arg(long, value_name = "ARGUMENTS", conflicts_with = "command_line")]
    pub append: Option<String>,

    /// Use this command line instead of the running kernel's
    #[arg(long, value_name = "ARGUMENTS")]
    pub command_line: Option<String>,

    /// Let no service run before all of its memory is filled, rather than as it is touched
    #[arg(long)]
    pub eager: bool,

    /// Copy memory while the services run, until what they write meanwhile is copied in this time
    /// (milliseconds); 0: copy everything when they stand still
    #[arg(long, value_name = "MS", default_value_t = BLACKOUT_BUDGET_MS)]
    pub blackout_budget: u64,

    /// Check everything and touch nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Load the kernel and stop: `systemctl kexec` then carries the services
    #[arg(long, conflicts_with = "dry_run")]
    pub load: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// Do not ask before the jump
    #[arg(long, short)]
    pub yes: bool,

    /// Fail at the end of this stage
    #[arg(long, value_name = "STAGE", hide = true)]
    pub fail_at: Option<FailAt>,

    /// Run as the stop of rcr-pre-kexec.service
    #[arg(long, hide = true, conflicts_with_all = ["kernel", "load", "dry_run"])]
    pub pre_kexec: bool,

    /// Run as the unit that systemd starts last
    #[arg(long, hide = true, conflicts_with_all = ["kernel", "load", "dry_run"])]
    pub gate: bool,
}
