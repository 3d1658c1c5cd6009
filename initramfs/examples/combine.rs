//! Makes an initrd with the overlay behind it, for trying early boot by hand:
//! `combine INITRD PROGRAM MODULES_ROOT RELEASE OUT`.

use std::path::Path;

use rcr_initramfs::modules::STORE_MODULES;
use rcr_initramfs::{EarlyConfig, Initrd, ModuleSet, OverlayInput, overlay};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [initrd, program, modules_root, release, out] = args.as_slice() else {
        anyhow::bail!("usage: combine INITRD PROGRAM MODULES_ROOT RELEASE OUT");
    };
    let initrd = Initrd::read(Path::new(initrd))?;
    let modules = ModuleSet::resolve(Path::new(modules_root), release, &STORE_MODULES)?;
    let names: Vec<_> = modules
        .modules()
        .iter()
        .map(|module| module.name.as_str())
        .collect();
    println!(
        "{:?}, {} files, modules {names:?}",
        initrd.family(),
        initrd.names().len()
    );
    let overlay = overlay::build(
        &initrd,
        &OverlayInput {
            program: &std::fs::read(program)?,
            modules: &modules,
            config: EarlyConfig::default(),
            module_options: Default::default(),
        },
    )?;
    println!("overlay of {} bytes", overlay.len());
    std::fs::write(out, initrd.append(&overlay))?;
    Ok(())
}
