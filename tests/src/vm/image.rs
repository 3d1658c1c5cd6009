//! The cached image: a root file system and the kernels in it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A root file system for machines, never written to.
#[derive(Debug, Clone)]
pub struct Image {
    /// The folder that holds `root.img` and `boot/`.
    pub dir: PathBuf,
    /// Its kernels, oldest version first.
    pub kernels: Vec<Kernel>,
}

/// A kernel of the image, with copies on the host for a direct boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// `uname -r`; in the guest it is `/boot/vmlinuz-RELEASE`.
    pub release: String,
    /// The host's copy of the kernel.
    pub vmlinuz: PathBuf,
    /// The host's copy of the initramfs.
    pub initrd: PathBuf,
}

impl Image {
    /// Opens a finished image folder.
    ///
    /// # Errors
    /// When a part of it is missing.
    pub fn open(dir: &Path) -> Result<Image> {
        let boot = dir.join("boot");
        let mut kernels = Vec::new();
        for entry in fs::read_dir(&boot).with_context(|| format!("reading {}", boot.display()))? {
            let vmlinuz = entry?.path();
            let name = vmlinuz
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let Some(release) = name.strip_prefix("vmlinuz-") else {
                continue;
            };
            let initrd = boot.join(format!("initrd.img-{release}"));
            if !initrd.exists() {
                bail!("{} is missing", initrd.display());
            }
            kernels.push(Kernel {
                release: release.to_owned(),
                vmlinuz,
                initrd,
            });
        }
        kernels.sort_by_key(|kernel| numbers(&kernel.release));
        if kernels.len() < 2 {
            bail!(
                "{} holds {} kernels, two are needed",
                boot.display(),
                kernels.len()
            );
        }
        Ok(Image {
            dir: dir.to_owned(),
            kernels,
        })
    }

    /// The root file system.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root.img")
    }

    /// The oldest kernel.
    pub fn oldest(&self) -> &Kernel {
        &self.kernels[0]
    }

    /// The newest kernel.
    pub fn newest(&self) -> &Kernel {
        &self.kernels[self.kernels.len() - 1]
    }

    /// The kernel whose release starts with `prefix` (`6.12`).
    ///
    /// # Errors
    /// When there is none.
    pub fn kernel(&self, prefix: &str) -> Result<&Kernel> {
        self.kernels
            .iter()
            .find(|kernel| kernel.release.starts_with(prefix))
            .with_context(|| {
                let have: Vec<&str> = self.kernels.iter().map(|k| k.release.as_str()).collect();
                format!(
                    "the image has no kernel {prefix}; it has {}",
                    have.join(", ")
                )
            })
    }
}

/// The numbers in a release, for ordering: `6.12.9` comes before `6.12.41`.
fn numbers(release: &str) -> Vec<u64> {
    release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_number() {
        assert!(numbers("6.12.9+deb13-amd64") < numbers("6.12.41+deb13-amd64"));
        assert!(numbers("6.12.117+deb13-amd64") < numbers("7.3.4+deb13-amd64"));
    }
}
