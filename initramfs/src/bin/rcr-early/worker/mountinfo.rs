//! Where something is mounted (`/proc/self/mountinfo`, proc(5)).

/// The mount points in the text of a mountinfo file, in its order.
pub fn mountpoints(text: &[u8]) -> Vec<Vec<u8>> {
    text.split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(unescape)
        .collect()
}

/// Undoes the kernel's `\ooo` for white space and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        rest = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] if *first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                tail
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let text = b"22 1 8:1 / / rw shared:1 - ext4 /dev/vda rw\n\
                     23 22 0:5 / /mnt/a\\040b\\134 rw - tmpfs x rw\nshort\n";
        assert_eq!(mountpoints(text), [b"/".to_vec(), b"/mnt/a b\\".to_vec()]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_an_answer(text: Vec<u8>) {
            mountpoints(&text);
        }

        #[test]
        fn a_path_comes_back(path in "[ -~\t]{1,20}") {
            let escaped: String = path
                .chars()
                .map(|c| match c {
                    ' ' | '\t' | '\\' => format!("\\{:03o}", c as u32),
                    c => c.to_string(),
                })
                .collect();
            let text = format!("1 1 0:1 / {escaped} rw - a b rw\n");
            proptest::prop_assert_eq!(mountpoints(text.as_bytes()), [path.into_bytes()]);
        }
    }
}
