//! Which process ids early boot may use.

/// The lowest base: above what any kernel's own threads reach in early boot.
pub const PID_BASE_MIN: u32 = 100_000;

/// Distance between bases. Early boot forks some hundred processes.
const STEP: u32 = 100_000;

/// Where the new kernel's allocation of process ids is to start so that it meets
/// none of `kept`, the ids (of processes, threads, groups and sessions) that are
/// to be restored.
///
/// The ids of an earlier upgrade's services are as high as this boot's own, so a
/// fixed base would let a chain of upgrades collide with itself.
pub fn choose_pid_base(kept: &[i32]) -> u32 {
    (PID_BASE_MIN..4_000_000)
        .step_by(STEP as usize)
        .find(|base| {
            let range = *base as i32..(*base + STEP) as i32;
            !kept.iter().any(|pid| range.contains(pid))
        })
        .unwrap_or(PID_BASE_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_keeps_clear_of_kept_ids() {
        assert_eq!(choose_pid_base(&[]), 100_000);
        assert_eq!(choose_pid_base(&[313, 453]), 100_000);
        assert_eq!(choose_pid_base(&[453, 100_412]), 200_000);
        assert_eq!(choose_pid_base(&[100_412, 200_001, 399_999]), 400_000);
        assert_eq!(choose_pid_base(&[300_000]), 100_000);
    }
}
