//! The new kernel's modules that early boot needs, resolved and unpacked.

pub(crate) mod dep;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::compress::{CompressError, Compression};
use crate::config::ModuleFile;
use dep::{DepError, ModulesDep};

/// The modules that give user space the handed-over memory, in the order they
/// are asked for: the driver for devices of memory first, so that it is there
/// when `dax_hmem` makes such a device.
pub const STORE_MODULES: [&str; 2] = ["device_dax", "dax_hmem"];

/// Most bytes of a module's file, packed or unpacked.
const MODULE_BYTES_MAX: u64 = 64 << 20;

/// Most bytes of `modules.dep` and the like.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Modules in the order in which they must be loaded.
#[derive(Debug, Clone, Default)]
pub struct ModuleSet {
    modules: Vec<Module>,
}

/// One module, unpacked.
#[derive(Debug, Clone)]
pub struct Module {
    /// Name with underscores.
    pub name: String,
    /// The ELF object as init_module(2) takes it.
    pub bytes: Vec<u8>,
}

/// Why the modules of the new kernel cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The kernel's modules are not installed.
    #[error(
        "the modules of kernel {release} are not installed: there is no {}; install that kernel's package (linux-image or linux-modules) or run 'depmod {release}'",
        path.display()
    )]
    NotInstalled {
        /// `uname -r` of the kernel.
        release: String,
        /// The file that was looked for.
        path: PathBuf,
    },
    /// A kernel that was built without it.
    #[error(
        "kernel {release} has no module {module}, which brings the handed-over memory to user space; it needs a kernel built with CONFIG_DEV_DAX_HMEM"
    )]
    Unknown {
        /// `uname -r` of the kernel.
        release: String,
        /// The module.
        module: String,
    },
    /// The index is not what depmod writes.
    #[error("{}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        source: DepError,
    },
    /// A file cannot be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file is larger than any module.
    #[error("{} is larger than {limit_bytes} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit_bytes: u64,
    },
    /// A module's file is packed in a way that cannot be read.
    #[error("{}", path.display())]
    Compression {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: CompressError,
    },
    /// What came out is no ELF object.
    #[error("{} is no kernel module", path.display())]
    NotAModule {
        /// The file.
        path: PathBuf,
    },
}

impl ModuleSet {
    /// The modules `wanted` of kernel `release` beneath `modules_root`
    /// (`/lib/modules`) with all they depend on. Those built into the kernel are
    /// left out.
    pub fn resolve(
        modules_root: &Path,
        release: &str,
        wanted: &[&str],
    ) -> Result<Self, ModuleError> {
        let dir = modules_root.join(release);
        let dep_path = dir.join("modules.dep");
        let dep_bytes = match read_bounded(&dep_path, INDEX_BYTES_MAX) {
            Err(ModuleError::Read { source, path }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ModuleError::NotInstalled {
                    release: release.to_owned(),
                    path,
                });
            }
            other => other?,
        };
        let dep = ModulesDep::parse(&dep_bytes).map_err(|source| ModuleError::Index {
            path: dep_path.clone(),
            source,
        })?;
        let builtin = match read_bounded(&dir.join("modules.builtin"), INDEX_BYTES_MAX) {
            // Kernels without any driver built in have none.
            Err(ModuleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Vec::new()
            }
            other => other?,
        };
        let builtin = dep::builtin_names(&builtin);
        let loadable: Vec<&str> = wanted
            .iter()
            .copied()
            .filter(|name| !builtin.contains(*name))
            .collect();
        if let Some(module) = loadable.iter().find(|name| !dep.contains(name)) {
            return Err(ModuleError::Unknown {
                release: release.to_owned(),
                module: (*module).to_owned(),
            });
        }
        let order = dep
            .load_order(&loadable)
            .map_err(|source| ModuleError::Index {
                path: dep_path,
                source,
            })?;
        let modules = order
            .into_iter()
            .map(|(name, file)| {
                Ok(Module {
                    name: name.to_owned(),
                    bytes: unpack(&dir.join(file))?,
                })
            })
            .collect::<Result<_, ModuleError>>()?;
        Ok(ModuleSet { modules })
    }

    /// The modules in load order.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// File names for the overlay (`001-dax.ko`), in load order, with the
    /// parameters that `options` has for a module.
    pub fn files(&self, options: &BTreeMap<String, String>) -> Vec<ModuleFile> {
        (1..)
            .zip(&self.modules)
            .map(|(number, module)| ModuleFile {
                name: module.name.clone(),
                file: format!("{number:03}-{}.ko", module.name),
                options: options.get(&module.name).cloned().unwrap_or_default(),
            })
            .collect()
    }
}

/// Reads a module's file; its first bytes say how it is packed.
fn unpack(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let bytes = read_bounded(path, MODULE_BYTES_MAX)?;
    let error = |source| ModuleError::Compression {
        path: path.into(),
        source,
    };
    let bytes = match Compression::detect(&bytes).map_err(error)? {
        None => bytes,
        Some(compression) => compression
            .unpack(&bytes, MODULE_BYTES_MAX)
            .map_err(error)?,
    };
    if !bytes.starts_with(b"\x7fELF") {
        return Err(ModuleError::NotAModule { path: path.into() });
    }
    Ok(bytes)
}

fn read_bounded(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, ModuleError> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(limit_bytes + 1).read_to_end(&mut bytes))
        .map_err(|source| ModuleError::Read {
            path: path.into(),
            source,
        })?;
    if bytes.len() as u64 > limit_bytes {
        return Err(ModuleError::TooLarge {
            path: path.into(),
            limit_bytes,
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::compress::tests::{gzip, xz, zstd};

    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("7.3.4");
        fs::create_dir_all(dir.join("kernel/d")).unwrap();
        fs::write(
            dir.join("modules.dep"),
            "kernel/d/device_dax.ko.zst: kernel/d/dax.ko.gz\n\
             kernel/d/dax_hmem.ko.xz: kernel/d/hmem-base.ko kernel/d/dax.ko.gz\n\
             kernel/d/dax.ko.gz:\n\
             kernel/d/hmem-base.ko: kernel/d/dax.ko.gz\n\
             kernel/d/text.ko:\n",
        )
        .unwrap();
        fs::write(dir.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let elf = |name: &str| [b"\x7fELF", name.as_bytes()].concat();
        fs::write(
            dir.join("kernel/d/device_dax.ko.zst"),
            zstd(&elf("device_dax")),
        )
        .unwrap();
        fs::write(dir.join("kernel/d/dax.ko.gz"), gzip(&elf("dax"))).unwrap();
        fs::write(dir.join("kernel/d/hmem-base.ko"), elf("base")).unwrap();
        let hmem = xz(&elf("dax_hmem")).unwrap_or_else(|| elf("dax_hmem"));
        fs::write(dir.join("kernel/d/dax_hmem.ko.xz"), hmem).unwrap();
        fs::write(dir.join("kernel/d/text.ko"), "no module").unwrap();
        root
    }

    #[test]
    fn modules_come_unpacked_after_what_they_need() {
        let root = tree();
        let set =
            ModuleSet::resolve(root.path(), "7.3.4", &["device_dax", "dax_hmem", "ext4"]).unwrap();
        let names: Vec<_> = set.modules().iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["dax", "device_dax", "hmem_base", "dax_hmem"]);
        assert!(
            set.modules()
                .iter()
                .all(|m| m.bytes.starts_with(b"\x7fELF"))
        );
        let options = BTreeMap::from([("dax_hmem".to_owned(), "region_idle=1".to_owned())]);
        let files = set.files(&options);
        assert_eq!(files[0].file, "001-dax.ko");
        assert_eq!(files[3].options, "region_idle=1");
    }

    #[test]
    fn what_is_missing_is_said() {
        let root = tree();
        let error = ModuleSet::resolve(root.path(), "6.1", &["dax"]).unwrap_err();
        assert!(matches!(&error, ModuleError::NotInstalled { release, .. } if release == "6.1"));
        assert!(error.to_string().contains("install"));
        let error = ModuleSet::resolve(root.path(), "7.3.4", &["cxl_mem"]).unwrap_err();
        assert!(matches!(error, ModuleError::Unknown { module, .. } if module == "cxl_mem"));
        let error = ModuleSet::resolve(root.path(), "7.3.4", &["text"]).unwrap_err();
        assert!(matches!(error, ModuleError::NotAModule { .. }));
        fs::remove_file(root.path().join("7.3.4/kernel/d/dax.ko.gz")).unwrap();
        let error = ModuleSet::resolve(root.path(), "7.3.4", &["dax"]).unwrap_err();
        assert!(matches!(error, ModuleError::Read { .. }));
    }
}
