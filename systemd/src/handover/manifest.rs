//! The manifest: what the old kernel's side put into the store.

use serde::{Deserialize, Serialize};

use super::{FORMAT_VERSION, HandoverError, StageTime};

/// What the store holds and what the new kernel's side must know of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT_VERSION`] of the writer.
    pub format: u32,
    /// The store's nonce as 32 lower-case hex digits.
    pub nonce: String,
    /// `uname -r` of the kernel that is left.
    pub kernel_before: String,
    /// Release of the kernel that is entered, as its bzImage says.
    pub kernel_after: String,
    /// `/proc/sys/kernel/random/boot_id` of the kernel that is left.
    pub boot_id: String,
    /// When the upgrade was started, ms since 1970.
    pub started_ms: u64,
    /// When the services were frozen, ms since 1970: the blackout's beginning.
    pub frozen_ms: u64,
    /// The services, in the order of the tag list.
    pub units: Vec<UnitPlan>,
    /// Tagged services that are not in the store, as something failed once the
    /// transition had begun.
    #[serde(default)]
    pub lost: Vec<LostUnit>,
    /// Mounts of the host that must exist before anything is restored.
    #[serde(default)]
    pub pseudo_mounts: Vec<PseudoMount>,
    /// The old side's stages up to the sealing of the store.
    #[serde(default)]
    pub stages: Vec<StageTime>,
}

impl Manifest {
    /// The manifest as the image's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest is plain data with string keys")
    }

    /// Reads the image; another format version is an error.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HandoverError> {
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head = serde_json::from_slice(bytes).map_err(HandoverError::Manifest)?;
        if head.format != FORMAT_VERSION {
            return Err(HandoverError::Version { found: head.format });
        }
        serde_json::from_slice(bytes).map_err(HandoverError::Manifest)
    }
}

/// A tagged service that is not in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostUnit {
    /// Full unit name.
    pub unit: String,
    /// Its main process.
    #[serde(default)]
    pub main_pid: Option<i32>,
    /// Why.
    pub reason: String,
}

/// A service in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitPlan {
    /// Full unit name (`redis-server.service`).
    pub unit: String,
    /// Its cgroup below the cgroup2 root, as systemd's `ControlGroup=` says
    /// (`/system.slice/redis-server.service`).
    pub cgroup: String,
    /// The slice it sits in (`system.slice`).
    pub slice: String,
    /// Its main process; `None` for a service whose main process is not known.
    pub main_pid: Option<i32>,
    /// `Type=`.
    pub service_type: ServiceType,
    /// `PIDFile=`, absolute.
    #[serde(default)]
    pub pid_file: Option<String>,
    /// What its images' names begin with, the slash included
    /// (`redis-server.service/`).
    pub image_prefix: String,
    /// The same of the images that those refer to, as
    /// [`rcr_engine::image::Generations`] wants them: the newest first.
    #[serde(default)]
    pub ahead: Vec<String>,
    /// Every process of it in the initial PID namespace.
    pub pids: Vec<i32>,
    /// Directories and files on tmpfs that its tree [`super::RUNTIME_TREE`]
    /// holds.
    #[serde(default)]
    pub runtime_paths: Vec<String>,
    /// `StandardOutput=` was a journal stream or the like, `SyslogIdentifier=`
    /// of it.
    #[serde(default)]
    pub syslog_identifier: String,
    /// Descriptors that lead to the old journal.
    #[serde(default)]
    pub journal_streams: Vec<super::OutputStream>,
}

impl UnitPlan {
    /// The prefix that the images of `unit` get.
    pub fn prefix_of(unit: &str) -> String {
        format!("{unit}/")
    }

    /// The prefix that copies of the memory of `unit` get which are made while
    /// it runs: the first is number 0.
    pub fn ahead_prefix_of(unit: &str, number: usize) -> String {
        format!("{unit}/ahead-{number}/")
    }

    /// In front of the names of all images of it, the newest first.
    pub fn image_prefixes(&self) -> Vec<String> {
        let own = std::iter::once(&self.image_prefix);
        own.chain(&self.ahead).cloned().collect()
    }
}

/// `Type=` of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceType {
    /// Running once forked off.
    Simple,
    /// Running once executed.
    Exec,
    /// Running once the started process has exited.
    Forking,
    /// Running once it exits; has no lasting process.
    Oneshot,
    /// Running once its bus name is taken.
    Dbus,
    /// Running once it says so.
    Notify,
    /// As [`Self::Notify`], and it says so at reloads too.
    NotifyReload,
    /// Started when the job queue is empty.
    Idle,
}

impl ServiceType {
    /// The word systemd uses.
    pub fn as_str(self) -> &'static str {
        match self {
            ServiceType::Simple => "simple",
            ServiceType::Exec => "exec",
            ServiceType::Forking => "forking",
            ServiceType::Oneshot => "oneshot",
            ServiceType::Dbus => "dbus",
            ServiceType::Notify => "notify",
            ServiceType::NotifyReload => "notify-reload",
            ServiceType::Idle => "idle",
        }
    }

    /// Reads systemd's word.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "simple" => ServiceType::Simple,
            "exec" => ServiceType::Exec,
            "forking" => ServiceType::Forking,
            "oneshot" => ServiceType::Oneshot,
            "dbus" => ServiceType::Dbus,
            "notify" => ServiceType::Notify,
            "notify-reload" => ServiceType::NotifyReload,
            "idle" => ServiceType::Idle,
            _ => return None,
        })
    }
}

/// A mount of the host that services stand on and that systemd would only make
/// later (`/tmp`, `/run/lock`, `/dev/hugepages`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PseudoMount {
    /// Where.
    pub mountpoint: String,
    /// Filesystem type as in `/proc/self/mountinfo`.
    pub fstype: String,
    /// Source as in `/proc/self/mountinfo`.
    pub source: String,
    /// Per-mount and superblock options, comma separated, as `mount -o` takes
    /// them.
    pub options: String,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn sample() -> Manifest {
        Manifest {
            format: FORMAT_VERSION,
            nonce: "00112233445566778899aabbccddeeff".into(),
            kernel_before: "6.12.1-amd64".into(),
            kernel_after: "7.3.4-amd64".into(),
            boot_id: "b0".into(),
            started_ms: 1,
            frozen_ms: 2,
            units: vec![UnitPlan {
                unit: "redis-server.service".into(),
                cgroup: "/system.slice/redis-server.service".into(),
                slice: "system.slice".into(),
                main_pid: Some(100_123),
                service_type: ServiceType::Notify,
                pid_file: None,
                image_prefix: UnitPlan::prefix_of("redis-server.service"),
                ahead: vec![UnitPlan::ahead_prefix_of("redis-server.service", 0)],
                pids: vec![100_123],
                runtime_paths: vec!["/run/redis".into()],
                syslog_identifier: "redis-server".into(),
                journal_streams: Vec::new(),
            }],
            lost: Vec::new(),
            pseudo_mounts: Vec::new(),
            stages: Vec::new(),
        }
    }

    #[test]
    fn a_manifest_comes_back() {
        let manifest = sample();
        assert_eq!(
            Manifest::from_bytes(&manifest.to_bytes()).unwrap(),
            manifest
        );
    }

    #[test]
    fn another_format_is_refused_by_its_number() {
        let mut manifest = sample();
        manifest.format = FORMAT_VERSION + 1;
        let error = Manifest::from_bytes(&manifest.to_bytes()).unwrap_err();
        assert!(matches!(error, HandoverError::Version { found } if found == FORMAT_VERSION + 1));
        assert!(matches!(
            Manifest::from_bytes(br#"{"format":99,"units":7}"#),
            Err(HandoverError::Version { found: 99 })
        ));
        assert!(matches!(
            Manifest::from_bytes(b"\0\0"),
            Err(HandoverError::Manifest(_))
        ));
    }

    #[test]
    fn service_types_read_as_they_are_written() {
        for word in [
            "simple",
            "exec",
            "forking",
            "oneshot",
            "dbus",
            "notify",
            "notify-reload",
            "idle",
        ] {
            assert_eq!(ServiceType::parse(word).unwrap().as_str(), word);
        }
        assert_eq!(ServiceType::parse("Simple"), None);
    }
}
