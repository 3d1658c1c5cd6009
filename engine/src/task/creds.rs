//! Credentials: ids, groups, capabilities, securebits, no_new_privs
//! (credentials(7), capabilities(7)).

use crate::image::schema::CredsEntry;
use crate::remote::Program;

const PR_CAPBSET_DROP: i32 = 24;
const PR_SET_SECUREBITS: i32 = 28;
const PR_SET_NO_NEW_PRIVS: i32 = 38;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: i32 = 4;
/// `SECBIT_NO_SETUID_FIXUP`: changes of uid leave capabilities alone.
const NO_SETUID_FIXUP: i32 = 1 << 2;
/// `SECBIT_KEEP_CAPS`.
const KEEP_CAPS: i32 = 1 << 4;
/// `_LINUX_CAPABILITY_VERSION_3`.
const CAPABILITY_V3: u32 = 0x2008_0522;

/// Sets groups and effective ids for a while; every capability stays.
pub fn lend_ids(p: &mut Program, uid: u32, gid: u32, groups: &[u32]) {
    let list: Vec<u8> = groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let list = p.bytes(&list);
    let args = [(groups.len() as u64).into(), list.into()];
    p.call(libc::SYS_setgroups, "lend supplementary groups", &args);
    let bits = (NO_SETUID_FIXUP | KEEP_CAPS).into();
    let args = [PR_SET_SECUREBITS.into(), bits, 0.into(), 0.into(), 0.into()];
    let what = "keep capabilities across the change of ids";
    p.call(libc::SYS_prctl, what, &args);
    let keep = u64::MAX;
    let only = |id: u32| [keep.into(), u64::from(id).into(), keep.into()];
    p.call(libc::SYS_setresgid, "lend a group", &only(gid));
    p.call(libc::SYS_setresuid, "lend a user", &only(uid));
}

/// Sets groups and ids; every capability stays for the calls that follow.
///
/// To be run in the initial user namespace, where all ids exist.
pub fn restore_ids(p: &mut Program, c: &CredsEntry) {
    let groups: Vec<u8> = c.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let list = p.bytes(&groups);
    let n = c.groups.len() as u64;
    p.call(
        libc::SYS_setgroups,
        "set supplementary groups",
        &[n.into(), list.into()],
    );
    p.call(
        libc::SYS_prctl,
        "keep capabilities across the change of ids",
        &[
            PR_SET_SECUREBITS.into(),
            (NO_SETUID_FIXUP | KEEP_CAPS).into(),
            0.into(),
            0.into(),
            0.into(),
        ],
    );
    let id = |v: u32| u64::from(v).into();
    p.call(
        libc::SYS_setresgid,
        "set group ids",
        &[id(c.gid), id(c.egid), id(c.sgid)],
    );
    p.call(
        libc::SYS_setresuid,
        "set user ids",
        &[id(c.uid), id(c.euid), id(c.suid)],
    );
    // Both return the previous id, whatever happens.
    p.try_call(
        libc::SYS_setfsgid,
        "set the file system group id",
        &[id(c.fsgid)],
    );
    p.try_call(
        libc::SYS_setfsuid,
        "set the file system user id",
        &[id(c.fsuid)],
    );
}

/// Sets capabilities and what guards them, and no_new_privs: the last step.
pub fn restore_caps(p: &mut Program, c: &CredsEntry) {
    let set = |v: &[u32]| {
        u64::from(v.first().copied().unwrap_or(0)) | u64::from(v.get(1).copied().unwrap_or(0)) << 32
    };
    let bounding = set(&c.cap_bnd);
    for cap in (0..64).filter(|c| bounding >> c & 1 == 0) {
        // Capabilities the kernel does not know (EINVAL) are not there to drop.
        p.try_call(
            libc::SYS_prctl,
            format!("drop capability {cap} from the bounding set"),
            &[
                PR_CAPBSET_DROP.into(),
                cap.into(),
                0.into(),
                0.into(),
                0.into(),
            ],
        );
    }
    p.call(
        libc::SYS_prctl,
        "clear ambient capabilities",
        &[
            PR_CAP_AMBIENT.into(),
            PR_CAP_AMBIENT_CLEAR_ALL.into(),
            0.into(),
            0.into(),
            0.into(),
        ],
    );
    let (eff, prm, inh) = (set(&c.cap_eff), set(&c.cap_prm), set(&c.cap_inh));
    let header = p.bytes(&[CAPABILITY_V3, 0].map(u32::to_le_bytes).concat());
    // Inheritable ones must be there before ambient ones can be raised.
    let low_high = |shift: u32| {
        [eff, prm, inh]
            .map(|v| ((v >> shift) as u32).to_le_bytes())
            .concat()
    };
    let data = p.bytes(&[low_high(0), low_high(32)].concat());
    p.call(
        libc::SYS_prctl,
        "set securebits",
        &[
            PR_SET_SECUREBITS.into(),
            u64::from(c.secbits).into(),
            0.into(),
            0.into(),
            0.into(),
        ],
    );
    p.call(
        libc::SYS_capset,
        "set capabilities",
        &[header.into(), data.into()],
    );
    let ambient = set(&c.cap_amb);
    for cap in (0..64).filter(|c| ambient >> c & 1 == 1) {
        p.call(
            libc::SYS_prctl,
            format!("raise ambient capability {cap}"),
            &[
                PR_CAP_AMBIENT.into(),
                PR_CAP_AMBIENT_RAISE.into(),
                cap.into(),
                0.into(),
                0.into(),
            ],
        );
    }
    if c.no_new_privs == Some(1) {
        p.call(
            libc::SYS_prctl,
            "set no_new_privs",
            &[
                PR_SET_NO_NEW_PRIVS.into(),
                1.into(),
                0.into(),
                0.into(),
                0.into(),
            ],
        );
    }
}

/// Whether two threads have the same ids and groups.
pub fn same_ids(a: &CredsEntry, b: &CredsEntry) -> bool {
    let ids = |c: &CredsEntry| {
        (
            [c.uid, c.euid, c.suid, c.fsuid],
            [c.gid, c.egid, c.sgid, c.fsgid],
            c.groups.clone(),
        )
    };
    ids(a) == ids(b)
}
