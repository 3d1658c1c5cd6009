//! What runs first in the new kernel, and how it gets there.
//!
//! ```text
//! old kernel                                        new kernel
//! /boot/initrd.img-NEW ─▶ Initrd::read              conf.d or dracut hook ─▶ rcr-early early
//! /lib/modules/NEW ─▶ ModuleSet::resolve            before switch_root    ─▶ rcr-early stage
//! rcr-early, EarlyConfig ─▶ overlay::build          init=/run/rcr/boot/init: rcr-early init
//!            └─▶ initrd::append ─▶ kexec               └─ worker restores; then the real init
//! ```
//!
//! The library is the old side: it reads the distribution's initrd, decides how
//! that one can be hooked, and makes an archive of files of ours alone which the
//! kernel unpacks on top of it. The program `rcr-early` is the new side.

mod compress;
pub mod config;
#[doc(hidden)]
pub mod fuzzing;
pub mod initrd;
pub mod modules;
pub mod overlay;
mod pid_base;

pub use compress::{CompressError, Compression};
pub use config::EarlyConfig;
pub use initrd::{Family, Initrd, InitrdError};
pub use modules::{ModuleError, ModuleSet};
pub use overlay::{OverlayError, OverlayInput};
pub use pid_base::{PID_BASE_MIN, choose_pid_base};
