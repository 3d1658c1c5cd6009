//! Unit files without the dependencies by which a unit is stopped.

/// Settings of `[Unit]` that make a stop of another unit, or the start of
/// another unit, a stop of this one (systemd.unit(5)).
const TIES: [&str; 6] = [
    "Requires",
    "Requisite",
    "BindsTo",
    "PartOf",
    "StopPropagatedFrom",
    "Conflicts",
];

/// The text without them; `None` where it has none.
pub(super) fn without_ties(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let (mut in_unit, mut dropping, mut found) = (false, false, false);
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim();
        let is_comment = trimmed.starts_with(['#', ';']);
        if !dropping {
            if trimmed.starts_with('[') {
                in_unit = trimmed == "[Unit]";
            }
            let key = line.split_once('=').map(|(key, _)| key.trim());
            dropping = in_unit && !is_comment && key.is_some_and(|key| TIES.contains(&key));
        }
        if dropping {
            found = true;
            // Comments may stand between the lines of one setting.
            dropping = is_comment || trimmed.ends_with('\\');
        } else {
            out.push_str(line);
        }
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ties_is_left_out() {
        let text = "[Unit]\nDescription=a\nPartOf = b.service\nRequires=c.service \\\n# d\n  \
                    e.service\nAfter=c.service\n[Service]\nConflicts=kept\n";
        assert_eq!(
            without_ties(text).unwrap(),
            "[Unit]\nDescription=a\nAfter=c.service\n[Service]\nConflicts=kept\n"
        );
        assert_eq!(without_ties("[Unit]\nWants=a\n# Requires=b\n"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_taken(text in "(\\PC{0,20}=?\\PC{0,9}\\\\?\n){0,12}") {
            if let Some(rest) = without_ties(&text) {
                proptest::prop_assert!(rest.len() < text.len());
            }
        }
    }
}
