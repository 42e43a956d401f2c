//! The files of one commit of a model.

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::name::{is_commit, is_hex};

/// Limit on the number of files of a model.
const MAX_FILES: usize = 100_000;
/// Limit on the length of a file's path in bytes.
const MAX_PATH: usize = 1024;
/// Limit on the size of a file in bytes.
const MAX_SIZE: u64 = 1 << 50;

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HubFile {
    /// Path below the model, with `/`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Name in the cache: SHA-256 of a large file, Git's object id (SHA-1) of another.
    pub id: String,
}

/// The files of one commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tree {
    /// The commit.
    pub commit: String,
    /// Its files, sorted by path.
    pub files: Vec<HubFile>,
}

/// The hub's answer about a model. Fields that are not read are skipped without being kept.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    sha: String,
    #[serde(default, deserialize_with = "siblings")]
    siblings: Option<Vec<Sibling>>,
}

/// One file in the hub's answer.
#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Large>,
}

/// A file's entry for content outside Git.
#[derive(Deserialize)]
struct Large {
    size: Option<u64>,
    sha256: Option<String>,
}

/// Reads the list of files up to `MAX_FILES`.
fn siblings<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<Sibling>>, D::Error> {
    struct Files;
    impl<'de> Visitor<'de> for Files {
        type Value = Vec<Sibling>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of files")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Sibling>, A::Error> {
            let mut files = Vec::new();
            while let Some(file) = list.next_element()? {
                if files.len() == MAX_FILES {
                    return Err(A::Error::custom(format!("more than {MAX_FILES} files")));
                }
                files.push(file);
            }
            Ok(files)
        }
    }
    deserializer.deserialize_seq(Files).map(Some)
}

/// True for a path that stays below its folder and that no tool reads in another way.
pub(super) fn is_safe(path: &str) -> bool {
    path.len() <= MAX_PATH
        && !path.contains(|c: char| c.is_control() || c == '\\')
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

impl Tree {
    /// Reads the hub's answer about a model with the details of its files. The answer is not trusted.
    ///
    /// Errors: a text on what is wrong with it.
    pub fn from_answer(answer: &[u8]) -> Result<Self, String> {
        let answer: Answer = serde_json::from_slice(answer).map_err(|e| match e.is_data() {
            true => format!("is not a list of files: {e}"),
            false => format!("is not JSON: {e}"),
        })?;
        let mut files = Vec::new();
        for Sibling { rfilename: path, size, blob_id, lfs } in answer.siblings.ok_or("has no list of files")? {
            let (size, id) = match lfs {
                Some(large) => (large.size.or(size), large.sha256),
                None => (size, blob_id),
            };
            let (Some(size), Some(id)) = (size, id) else {
                return Err(format!("gives no size or digest of `{}`", path.escape_debug()));
            };
            files.push(HubFile { path, size, id });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let tree = Tree { commit: answer.sha, files };
        tree.check()?;
        Ok(tree)
    }

    /// Checks a list, which a server or another program wrote.
    ///
    /// Errors: a text on what is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if !is_commit(&self.commit) {
            return Err(format!("names the commit `{}`, expected 40 hexadecimal digits", self.commit.escape_debug()));
        }
        if self.files.len() > MAX_FILES {
            return Err(format!("lists {} files, more than {MAX_FILES}", self.files.len()));
        }
        for (at, file) in self.files.iter().enumerate() {
            let shown = file.path.escape_debug();
            if !is_safe(&file.path) {
                return Err(format!("lists a file `{shown}`, whose path is not one inside of the model"));
            }
            if !is_hex(&file.id, 64) && !is_hex(&file.id, 40) {
                return Err(format!("lists `{shown}` with the digest `{}`", file.id.escape_debug()));
            }
            if file.size > MAX_SIZE || at > 0 && self.files[at - 1].path >= file.path {
                return Err(format!("lists `{shown}` twice, not in order, or with a size that no file has"));
            }
        }
        Ok(())
    }

    /// The file at a path.
    pub fn file(&self, path: &str) -> Option<&HubFile> {
        let at = self.files.binary_search_by(|file| file.path.as_str().cmp(path)).ok()?;
        self.files.get(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_that_are_not_a_list_of_a_models_files_are_refused() {
        let (commit, id) = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef");
        let one = |path: &str, size: u64, id: &str| json!({"rfilename": path, "size": size, "blobId": id});
        let large =
            json!({"rfilename": "onnx/a.onnx", "size": 3, "blobId": id, "lfs": {"sha256": "a".repeat(64), "size": 7}});
        let read = |answer: serde_json::Value| Tree::from_answer(answer.to_string().as_bytes());
        let tree = read(json!({"sha": commit, "siblings": [one("z.json", 2, id), large], "x": [[{}]]})).unwrap();
        assert_eq!(tree.file("z.json").map(|file| file.size), Some(2));
        assert_eq!((tree.file("a"), tree.file("zz")), (None, None));
        assert_eq!((tree.files[0].size, tree.files[0].id.len(), tree.files[1].path.as_str()), (7, 64, "z.json"));
        for (files, sha, want) in [
            (json!([one("../x", 1, id)]), commit, "not one inside"),
            (json!([one("/etc/passwd", 1, id)]), commit, "not one inside"),
            (json!([one("a//b", 1, id)]), commit, "not one inside"),
            (json!([one("a\\b", 1, id)]), commit, "not one inside"),
            (json!([one("a\u{0}", 1, id)]), commit, "not one inside"),
            (json!([one("a", 1, "../../x")]), commit, "with the digest"),
            (json!([one("a", 1, id), one("a", 1, id)]), commit, "twice"),
            (json!([one("a", u64::MAX, id)]), commit, "size that no file has"),
            (json!([{"rfilename": "a"}]), commit, "no size or digest"),
            (json!([{"rfilename": 3}]), commit, "expected a string"),
            (json!({}), commit, "expected a list of files"),
            (json!([]), "../x", "expected 40"),
        ] {
            let error = read(json!({"sha": sha, "siblings": files})).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
        for (bytes, want) in [
            (&b"\x1f\x8b\x08"[..], "is not JSON"),
            (b"{\"sha\": \"\xff\"}", "is not JSON"),
            (b"{}", "has no list of files"),
            (b"[0]", "is not a list of files"),
        ] {
            let error = Tree::from_answer(bytes).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }

    /// A list is read up to its limit, and one of the largest size is searched quickly.
    #[test]
    fn long_lists_are_bounded_and_searched_quickly() {
        let (commit, id) = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef");
        let answer = |count: usize| {
            let entry = |at| format!(r#"{{"rfilename":"{at:06}","size":1,"blobId":"{id}"}}"#);
            let entries: Vec<String> = (0..count).map(entry).collect();
            format!(r#"{{"sha":"{commit}","siblings":[{}]}}"#, entries.join(","))
        };
        let begun = std::time::Instant::now();
        let tree = Tree::from_answer(answer(MAX_FILES).as_bytes()).unwrap();
        assert!(tree.files.iter().all(|file| tree.file(&file.path) == Some(file)));
        assert!(begun.elapsed().as_secs_f64() < 10.0, "{:?}", begun.elapsed());
        let error = Tree::from_answer(answer(MAX_FILES + 1).as_bytes()).unwrap_err();
        assert!(error.contains("more than 100000 files"), "{error}");
    }
}
