//! Tests on real kernels: a QEMU harness, the agent inside the guest, and what
//! looks at the services from outside.
//!
//! ```text
//!  xtask ──> scenarios ──> vm::Vm ──> qemu::Machine   (one QEMU process)
//!                            ├─────> agent::Agent     (virtio-serial ⇄ rcr-agent)
//!                            └─────> qmp::Qmp         (snapshots, quit)
//! ```

#[cfg(feature = "bench")]
pub mod bench;
pub mod blackout;
#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "conformance")]
pub mod containers;
#[cfg(feature = "conformance")]
pub mod cross;
pub mod dataset;
pub mod facts;
pub mod guest;
pub mod held;
pub mod probe;
pub mod resp;
pub mod row;
pub mod scenarios;
pub mod services;
pub mod upgrade;
pub mod vm;
pub mod wire;
