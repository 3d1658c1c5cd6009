//! What systemd knows of a service.

use std::collections::HashMap;
use std::path::PathBuf;

use crate::handover::ServiceType;
use crate::systemctl::{self, SystemctlError};
use crate::tags::ServiceName;

/// The properties that are asked for.
const PROPERTIES: [&str; 19] = [
    "Id",
    "LoadState",
    "LoadError",
    "ActiveState",
    "SubState",
    "Type",
    "MainPID",
    "ControlGroup",
    "Slice",
    "PIDFile",
    "RuntimeDirectory",
    "DynamicUser",
    "NotifyAccess",
    "StandardOutput",
    "StandardError",
    "SyslogIdentifier",
    "ExecStart",
    "TriggeredBy",
    "NFileDescriptorStore",
];

/// Where the unified control group hierarchy is mounted.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// A service as systemd sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Full name, an alias resolved.
    pub id: String,
    /// `loaded`, `not-found`, `masked`, `error`, `bad-setting`.
    pub load_state: String,
    /// Why it could not be loaded.
    pub load_error: String,
    /// `active`, `inactive`, `failed`, `activating`, `deactivating`, `reloading`.
    pub active_state: String,
    /// `running`, `exited`, `dead` and the like.
    pub sub_state: String,
    /// `Type=`; `None` for a word that this program does not know.
    pub service_type: Option<ServiceType>,
    /// Its main process.
    pub main_pid: Option<i32>,
    /// Its control group below [`CGROUP_ROOT`], with a leading slash; empty
    /// while it has none.
    pub control_group: String,
    /// Its slice.
    pub slice: String,
    /// `PIDFile=`
    pub pid_file: Option<PathBuf>,
    /// `RuntimeDirectory=` as absolute paths.
    pub runtime_directories: Vec<PathBuf>,
    /// `DynamicUser=`
    pub dynamic_user: bool,
    /// `NotifyAccess=`
    pub notify_access: String,
    /// `StandardOutput=`
    pub standard_output: String,
    /// `StandardError=`
    pub standard_error: String,
    /// `SyslogIdentifier=`; where unset, the name of the program that it starts.
    pub syslog_identifier: String,
    /// Units that start it (sockets, timers, paths).
    pub triggered_by: Vec<String>,
    /// Descriptors that systemd keeps for it.
    pub stored_fds: u32,
}

/// Why a unit's state could not be had.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// `systemctl` did not answer.
    #[error(transparent)]
    Systemctl(#[from] SystemctlError),
    /// The answer lacks a property.
    #[error("systemd does not say the {property} of {unit}")]
    Property {
        /// The unit asked for.
        unit: String,
        /// What is missing.
        property: &'static str,
    },
    /// There is no such unit.
    #[error("there is no unit {unit}")]
    NotFound {
        /// Its name.
        unit: String,
    },
    /// The unit cannot be used.
    #[error("{unit} is {state}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    NotLoaded {
        /// Its name.
        unit: String,
        /// `masked`, `error`, `bad-setting`.
        state: String,
        /// systemd's words.
        detail: String,
    },
    /// The unit has no processes to carry.
    #[error("{unit} is not running ({active}, {sub}); start it or untag it")]
    NotRunning {
        /// Its name.
        unit: String,
        /// `ActiveState`
        active: String,
        /// `SubState`
        sub: String,
    },
}

impl Unit {
    /// Asks systemd. A unit that does not exist is an answer too: see
    /// [`Self::require_running`].
    pub fn query(name: &ServiceName) -> Result<Self, UnitError> {
        let property = format!("--property={}", PROPERTIES.join(","));
        let text = systemctl::run(&["show", &property, "--", name.as_str()])?;
        Self::parse(name.as_str(), &text)
    }

    /// Reads the answer of `systemctl show`.
    pub fn parse(name: &str, text: &str) -> Result<Self, UnitError> {
        let shown: HashMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .collect();
        let optional = |property: &str| shown.get(property).copied().unwrap_or_default().to_owned();
        let needed = |property: &'static str| {
            shown
                .get(property)
                .map(|value| (*value).to_owned())
                .ok_or_else(|| UnitError::Property {
                    unit: name.to_owned(),
                    property,
                })
        };
        let id = needed("Id")?;
        let words = |property: &str| -> Vec<String> {
            optional(property)
                .split_whitespace()
                .map(str::to_owned)
                .collect()
        };
        let started = optional("ExecStart");
        let identifier = match optional("SyslogIdentifier") {
            unset if unset.is_empty() => program(&started)
                .unwrap_or_else(|| id.strip_suffix(".service").unwrap_or(&id))
                .to_owned(),
            identifier => identifier,
        };
        Ok(Unit {
            load_state: needed("LoadState")?,
            active_state: needed("ActiveState")?,
            sub_state: needed("SubState")?,
            load_error: optional("LoadError").trim_matches('"').to_owned(),
            service_type: ServiceType::parse(&optional("Type")),
            main_pid: optional("MainPID").parse().ok().filter(|pid| *pid > 0),
            control_group: optional("ControlGroup"),
            slice: optional("Slice"),
            pid_file: Some(optional("PIDFile"))
                .filter(|p| !p.is_empty())
                .map(PathBuf::from),
            runtime_directories: words("RuntimeDirectory")
                .iter()
                // Since systemd 250 an entry may be `name:symlink`.
                .map(|entry| PathBuf::from("/run").join(entry.split(':').next().unwrap_or(entry)))
                .collect(),
            dynamic_user: optional("DynamicUser") == "yes",
            notify_access: optional("NotifyAccess"),
            standard_output: optional("StandardOutput"),
            standard_error: optional("StandardError"),
            syslog_identifier: identifier,
            triggered_by: words("TriggeredBy"),
            stored_fds: optional("NFileDescriptorStore").parse().unwrap_or(0),
            id,
        })
    }

    /// Refuses a unit that does not exist, cannot be used or does not run.
    pub fn require_running(&self) -> Result<(), UnitError> {
        match self.load_state.as_str() {
            "loaded" => {}
            "not-found" => {
                return Err(UnitError::NotFound {
                    unit: self.id.clone(),
                });
            }
            state => {
                return Err(UnitError::NotLoaded {
                    unit: self.id.clone(),
                    state: state.to_owned(),
                    detail: self.load_error.clone(),
                });
            }
        }
        if self.active_state != "active" || self.control_group.is_empty() {
            return Err(UnitError::NotRunning {
                unit: self.id.clone(),
                active: self.active_state.clone(),
                sub: self.sub_state.clone(),
            });
        }
        Ok(())
    }

    /// Its control group's directory.
    pub fn cgroup_dir(&self) -> PathBuf {
        PathBuf::from(format!("{CGROUP_ROOT}{}", self.control_group))
    }
}

/// The name of the program in `{ path=/bin/sh ; argv[]=… }`.
fn program(exec_start: &str) -> Option<&str> {
    let path = exec_start.strip_prefix("{ path=")?.split(" ; ").next()?;
    path.rsplit('/').next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REDIS: &str = "Type=notify\nPIDFile=/run/redis/redis-server.pid\nNotifyAccess=main\n\
        MainPID=4711\nNFileDescriptorStore=0\nControlGroup=/system.slice/redis-server.service\n\
        StandardOutput=journal\nStandardError=inherit\nSyslogIdentifier=\n\
        ExecStart={ path=/usr/bin/redis-check ; argv[]=redis ; ignore_errors=no }\n\
        RuntimeDirectory=redis\nSlice=system.slice\nId=redis-server.service\nTriggeredBy=\n\
        LoadState=loaded\nActiveState=active\nSubState=running\nDynamicUser=no\n";

    #[test]
    fn a_running_service_is_read() {
        let unit = Unit::parse("redis", REDIS).unwrap();
        unit.require_running().unwrap();
        assert_eq!(unit.main_pid, Some(4711));
        assert_eq!(unit.service_type, Some(ServiceType::Notify));
        assert_eq!(unit.runtime_directories, [PathBuf::from("/run/redis")]);
        assert_eq!(
            unit.pid_file,
            Some(PathBuf::from("/run/redis/redis-server.pid"))
        );
        assert!(!unit.dynamic_user);
        assert_eq!(unit.syslog_identifier, "redis-check");
        assert_eq!(
            unit.cgroup_dir(),
            PathBuf::from("/sys/fs/cgroup/system.slice/redis-server.service")
        );
    }

    #[test]
    fn the_identifier_has_fallbacks() {
        assert_eq!(
            program("{ path=/bin/sh ; argv[]=/bin/sh -c x }"),
            Some("sh")
        );
        assert_eq!(program(""), None);
    }

    #[test]
    fn what_cannot_run_is_told() {
        let told = |from: &str, to: &str| {
            Unit::parse("x", &REDIS.replace(from, to))
                .unwrap()
                .require_running()
                .unwrap_err()
        };
        assert_eq!(
            told("LoadState=loaded", "LoadState=not-found").to_string(),
            "there is no unit redis-server.service"
        );
        assert_eq!(
            told(
                "LoadState=loaded",
                "LoadState=masked\nLoadError=\"Unit is masked.\""
            )
            .to_string(),
            "redis-server.service is masked: Unit is masked."
        );
        assert_eq!(
            told(
                "ActiveState=active\nSubState=running",
                "ActiveState=failed\nSubState=failed"
            )
            .to_string(),
            "redis-server.service is not running (failed, failed); start it or untag it"
        );
        assert!(matches!(
            Unit::parse("x", "Id=x.service\n"),
            Err(UnitError::Property {
                property: "LoadState",
                ..
            })
        ));
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_parser_panic(text in "(\\PC{0,20}=?\\PC{0,20}\n){0,12}") {
            let _ = Unit::parse("x", &text);
        }
    }
}
