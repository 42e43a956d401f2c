//! The architecture: modules import only modules below them, only some modules use a heavy dependency, and every public
//! type has a name of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// From top to bottom; modules of one row do not import each other.
pub const LAYERS: &[&[&str]] = &[
    &["bin"],
    &["cli"],
    &["report"],
    &["pipeline"],
    &["method", "finetune", "export"],
    &["eval"],
    &["data", "runtime", "torch", "graft"],
    &["quantised"],
    &["prompt", "rewrite", "bundle", "checkpoint"],
    &["analysis"],
    &["onnx"],
    &["ir", "hub"],
    &["base"],
];

/// Crates that only some modules may use; `main` is `main.rs`.
const OWNERS: &[(&str, &[&str])] = &[
    ("protobuf", &["onnx"]),
    ("onnx_protobuf", &["onnx"]),
    ("ort", &["runtime"]),
    ("tract_onnx", &["runtime"]),
    ("tch", &["torch", "finetune"]),
    ("torch_sys", &["torch", "finetune"]),
    ("clap", &["cli", "main"]),
    ("anyhow", &["cli", "main"]),
    ("tokenizers", &["data"]),
    ("minijinja", &["data"]),
    ("minijinja_contrib", &["data"]),
    ("parquet", &["data"]),
    ("arrow", &["data"]),
    ("safetensors", &["data", "checkpoint"]),
    ("zip", &["data"]),
    ("ureq", &["base", "eval", "hub"]),
    ("sha1", &["hub"]),
    ("image", &["data"]),
    ("mozjpeg_sys", &["data"]),
    ("prost", &["export"]),
    ("prost_reflect", &["export"]),
    ("indicatif", &["base"]),
    ("ctrlc", &["base"]),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("source folder") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Module (first path component, or the file's stem at the top level), file, and text without comments.
fn modules() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 20, "only {} source files found", files.len());
    let read = |path: PathBuf| {
        let relative = path.strip_prefix(&root).expect("below src");
        let module = relative.components().next().expect("name").as_os_str().to_string_lossy().replace(".rs", "");
        let text = fs::read_to_string(&path).expect("source");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        (module, path, code)
    };
    files.into_iter().map(read).collect()
}

fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Names that follow `prefix` where `prefix` is a whole path segment.
fn names_after<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let starts = code.match_indices(prefix).filter(|(at, _)| *at == 0 || !is_name(code.as_bytes()[at - 1]));
    let mut names = Vec::new();
    for (at, _) in starts {
        let rest = &code[at + prefix.len()..];
        let list = match rest.strip_prefix('{') {
            // `use crate::{base::Error, ir}`: the names at the top level of the braces.
            Some(inner) => {
                let mut depth = 0;
                let end = inner.find(|c| {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    depth < 0
                });
                &inner[..end.unwrap_or(inner.len())]
            }
            None => rest,
        };
        let single = !rest.starts_with('{');
        let mut depth = 0;
        for item in list.split_inclusive(&[',', '{', '}']) {
            let name = item.trim().split(|c: char| !is_name(c as u8)).next().unwrap_or_default();
            if depth == 0 && !name.is_empty() {
                names.push(name);
            }
            if single {
                break;
            }
            depth += i32::from(item.ends_with('{')) - i32::from(item.ends_with('}'));
        }
    }
    names
}

#[test]
fn modules_import_only_modules_below_them() {
    let rank: BTreeMap<&str, usize> =
        LAYERS.iter().enumerate().flat_map(|(rank, names)| names.iter().map(move |name| (*name, rank))).collect();
    let mut wrong = Vec::new();
    for (module, path, code) in modules() {
        if module == "lib" || module == "main" {
            continue;
        }
        let Some(&own) = rank.get(module.as_str()) else {
            wrong.push(format!("{}: module `{module}` has no place in the order of layers", path.display()));
            continue;
        };
        for name in names_after(&code, "crate::") {
            match rank.get(name) {
                Some(&other) if name == module || other > own => {}
                Some(_) => {
                    wrong.push(format!("{}: `{module}` imports `{name}`, which is not below it", path.display()))
                }
                None => wrong.push(format!("{}: imports `crate::{name}`, which is no module", path.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Folders whose files have no import cycles. The `mod.rs` of a folder counts as one of its files, except that of a
/// whole module, which only declares its parts.
const WITHOUT_CYCLES: &[&str] = &[
    "analysis",
    "base",
    "bundle",
    "cli",
    "data",
    "data/images",
    "data/parquet",
    "data/placeholders",
    "data/tensors",
    "eval",
    "export",
    "export/triton",
    "graft",
    "ir",
    "method",
    "method/select",
    "onnx",
    "pipeline",
    "pipeline/steps",
    "pipeline/sweep",
    "pipeline/tune",
    "quantised",
    "rewrite",
    "runtime",
    "torch",
    "torch/ops",
];

/// The names on an import cycle, if there is one.
fn cycle(imports: &BTreeMap<String, Vec<String>>) -> Option<Vec<String>> {
    fn visit(
        name: &str,
        imports: &BTreeMap<String, Vec<String>>,
        path: &mut Vec<String>,
        done: &mut Vec<String>,
    ) -> bool {
        if let Some(start) = path.iter().position(|other| other == name) {
            path.drain(..start);
            return true;
        }
        if done.iter().any(|other| other == name) {
            return false;
        }
        path.push(name.to_string());
        for next in imports.get(name).into_iter().flatten() {
            if visit(next, imports, path, done) {
                return true;
            }
        }
        path.pop();
        done.push(name.to_string());
        false
    }
    let mut done = Vec::new();
    imports.keys().find_map(|name| {
        let mut path = Vec::new();
        visit(name, imports, &mut path, &mut done).then_some(path)
    })
}

/// For each file of a folder, the files of the folder that it imports.
fn imports_in(folder: &str) -> BTreeMap<String, Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(folder);
    let own: Vec<(String, String)> = modules()
        .into_iter()
        .filter(|(_, path, _)| path.parent() == Some(root.as_path()))
        .map(|(_, path, code)| (path.file_stem().expect("a name").to_string_lossy().into_owned(), code))
        .filter(|(file, _)| !file.ends_with("tests") && (file != "mod" || folder.contains('/')))
        .collect();
    let names: Vec<String> = own.iter().map(|(file, _)| file.clone()).collect();
    let absolute = format!("crate::{}::", folder.replace('/', "::"));
    let imports = own.into_iter().map(|(file, code)| {
        let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        let imported = match file.as_str() {
            "mod" => names.iter().filter(|name| code.contains(&format!("{name}::"))).cloned().collect(),
            // A name that is not a file is an item of `mod.rs`.
            _ => names_after(code, "use super::")
                .into_iter()
                .chain(names_after(code, &absolute).into_iter().filter(|name| names.iter().any(|file| file == name)))
                .filter(|name| *name != "super")
                .map(|name| if names.iter().any(|file| file == name) { name } else { "mod" }.to_string())
                .filter(|name| *name != file)
                .collect(),
        };
        (file, imported)
    });
    imports.collect()
}

#[test]
fn files_of_a_folder_have_no_import_cycles() {
    for folder in WITHOUT_CYCLES {
        let imports = imports_in(folder);
        assert!(imports.len() > 1, "{folder}: {} files found", imports.len());
        let found = cycle(&imports);
        assert!(found.is_none(), "{folder}: {} import in a cycle", found.unwrap_or_default().join(" -> "));
    }
    let ring = [("a", vec!["b"]), ("b", vec!["c"]), ("c", vec!["b"])];
    let ring = ring.map(|(name, all)| (name.to_string(), all.into_iter().map(str::to_string).collect()));
    assert_eq!(cycle(&ring.into()), Some(vec!["b".to_string(), "c".to_string()]));
}

/// The parts of large modules, from top to bottom: each imports only parts below it, as `crate::MODULE::PART`.
pub const PARTS: &[(&str, &[&str])] = &[(
    "finetune",
    &["run", "train", "student", "checkpoint", "data", "plan", "cut", "settings", "optim", "record", "loss", "error"],
)];

#[test]
fn parts_of_large_modules_import_only_parts_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for (module, parts) in PARTS {
        let mut files: BTreeMap<&str, BTreeMap<String, Vec<String>>> = BTreeMap::new();
        for (_, path, code) in modules().into_iter().filter(|(name, ..)| name == module) {
            let relative = path.strip_prefix(root.join(module)).expect("below the module");
            let first = relative.components().next().expect("a name").as_os_str().to_string_lossy().replace(".rs", "");
            if first == "mod" || first.ends_with("tests") {
                continue;
            }
            let Some(own) = parts.iter().position(|part| *part == first) else {
                wrong.push(format!("{}: `{first}` is not a part of `{module}`", path.display()));
                continue;
            };
            for name in names_after(&code, &format!("crate::{module}::")) {
                match parts.iter().position(|part| *part == name) {
                    Some(other) if other >= own => {}
                    _ => wrong.push(format!("{}: `{first}` imports `{name}`, which is not below it", path.display())),
                }
            }
            let file = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let code = code.split("#[cfg(test)]").next().unwrap_or_default();
            if relative.components().count() > 1 && file != "mod" && !file.ends_with("tests") {
                if code.contains("super::super::") {
                    wrong.push(format!("{}: leaves its part by `super::super`", path.display()));
                }
                let imports = names_after(code, "use super::").into_iter().map(str::to_string).collect();
                files.entry(parts[own]).or_default().insert(file, imports);
            }
        }
        assert!(files.len() > 3, "{module}: {} parts found", files.len());
        for (part, imports) in files {
            if let Some(found) = cycle(&imports) {
                wrong.push(format!("{module}/{part}: {} import in a cycle", found.join(" -> ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn heavy_dependencies_are_used_only_by_their_owners() {
    let mut wrong = Vec::new();
    for (module, path, code) in modules() {
        for (dependency, owners) in OWNERS {
            let path_use = format!("{dependency}::");
            let named = code.match_indices(&path_use).any(|(at, _)| {
                let before = code[..at].trim_end_matches("::");
                // `image::` may be a module of this crate, so only a path that starts with it names the dependency.
                before.len() == at && (at == 0 || !is_name(code.as_bytes()[at - 1]))
            });
            if named && !owners.contains(&module.as_str()) {
                wrong.push(format!("{}: names `{dependency}`, which belongs to {}", path.display(), owners.join(", ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Calls of LibTorch that wait until a GPU has computed all that was asked of it before. A copy by `to_device` is one, also
/// of a number to the GPU.
const WAITING: &[&str] = &[
    "to_device(",
    "host_ints(",
    "own_ints(",
    "_value(",
    "Vec::<",
    "allclose(",
    "bincount(",
    "equal(",
    "f_index(",
    "histc(",
    "is_nonzero(",
    "item(",
    "masked_select(",
    "multinomial(",
    "f_nonzero(",
    "f_repeat_interleave(",
    "repeat_interleave_self_tensor(",
    "unique",
    "f_where(",
];

/// Files that a training pass runs for every operator and every layer, and the waiting calls that each may make.
const IN_A_PASS: &[(&str, &[(&str, &str)])] = &[
    ("torch/ops", &[]),
    ("torch/ops/control.rs", &[("host_ints(", "the condition of a loop, which the account of host reads knows")]),
    ("torch/ops/elementwise.rs", &[("_value(", "an exponent on the host")]),
    ("torch/ops/experts.rs", &[("own_ints(", "tokens of each expert; the operator's row says so")]),
    (
        "torch/ops/index.rs",
        &[
            ("_value(", "indices on the host"),
            ("host_ints(", "an index on the host"),
            ("f_nonzero(", "an input that the operator's row names as read on the host"),
        ],
    ),
    ("torch/ops/resize.rs", &[("Vec::<", "an input that the operator's row names as read on the host")]),
    ("finetune/train/batches.rs", &[]),
    ("finetune/train/gradient.rs", &[]),
    ("finetune/loss.rs", &[]),
];

#[test]
fn a_training_pass_waits_for_a_gpu_only_where_it_must() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for (_, path, code) in modules() {
        let name = path.strip_prefix(&root).expect("below src").to_string_lossy().into_owned();
        let own = |(place, _): &&(&str, _)| name == *place || name.starts_with(&format!("{place}/"));
        let Some((_, allowed)) = IN_A_PASS.iter().rev().find(own) else { continue };
        let code = code.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        // Imports name what is called below.
        let calls = code.split_once(";\n\n").map_or(code, |(_, rest)| rest);
        let found: Vec<&str> = WAITING.iter().copied().filter(|call| calls.contains(call)).collect();
        let expected: Vec<&str> = allowed.iter().map(|(call, _)| *call).collect();
        if found.iter().any(|call| !expected.contains(call)) || expected.iter().any(|call| !found.contains(call)) {
            wrong.push(format!("{name}: calls {found:?}, {expected:?} are allowed"));
        }
        seen += 1;
    }
    assert!(seen > 20, "{seen} files found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Names that several public types share, each with its reason.
const SHARED_NAMES: &[(&str, &str)] = &[("Args", "the arguments of each command in `cli`, and of a kernel in `torch`")];

/// Names of the types that a file declares with `pub`, `pub(crate)`, `pub(super)` or `pub(in ..)`.
fn public_types(code: &str) -> Vec<&str> {
    let declared = |line| {
        let line = str::trim_start(line).strip_prefix("pub")?;
        let line = match line.strip_prefix('(') {
            Some(scope) => scope.split_once(')')?.1,
            None => line,
        };
        let (kind, rest) = line.strip_prefix(' ')?.split_once(' ')?;
        let name = rest.split(|c: char| !is_name(c as u8)).next()?;
        ["struct", "enum", "trait", "type", "union"].contains(&kind).then_some(name)
    };
    code.lines().filter_map(declared).collect()
}

#[test]
fn every_public_type_has_a_name_of_its_own() {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (_, path, code) in modules() {
        for name in public_types(&code) {
            files.entry(name.to_string()).or_default().push(path.display().to_string());
        }
    }
    assert!(files.len() > 400, "{} public types found", files.len());
    for (name, reason) in SHARED_NAMES {
        assert!(files.get(*name).is_some_and(|files| files.len() > 1), "`{name}` ({reason}) is not shared");
    }
    let shared = |name: &String| SHARED_NAMES.iter().any(|(other, _)| other == name);
    let wrong: Vec<String> = files
        .into_iter()
        .filter(|(name, files)| files.len() > 1 && !shared(name))
        .map(|(name, files)| format!("`{name}` has several meanings: {}", files.join(", ")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let code =
        "pub struct A<T>(T);\nstruct B;\n    pub(in crate::data) enum C {\npub(super) type D = u8;\npub fn e() {}";
    assert_eq!(public_types(code), ["A", "C", "D"]);
}

#[test]
fn the_import_parser_finds_every_imported_module() {
    let code = "use crate::base::{Error, Result};\nuse crate::{ir::Graph, onnx::{load, save}, rewrite};\nlet x = crate::data::f();";
    assert_eq!(names_after(code, "crate::"), ["base", "ir", "onnx", "rewrite", "data"]);
    assert!(names_after("use mycrate::base;", "crate::").is_empty());
}
