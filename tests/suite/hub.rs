//! Models on the hub: a small server with the hub's addresses, and the cache as `huggingface_hub` lays it out.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::Digest;

use super::cli::{fixture, stderr, stdout};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const OLD: &str = "89abcdef0123456789abcdef0123456789abcdef";
const TOKEN: &str = "hf_secret";
const DATA: &str = "onnx/decoder_model_merged.onnx_data";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a content in the cache: SHA-256 of large files, as Git LFS has them, Git's object id of others.
fn id(path: &str, content: &[u8]) -> String {
    if is_large(path) {
        return hex(&sha2::Sha256::digest(content));
    }
    let mut digest = sha1::Sha1::new_with_prefix(format!("blob {}\0", content.len()));
    digest.update(content);
    hex(&digest.finalize())
}

fn is_large(path: &str) -> bool {
    [".onnx", ".onnx_data", ".safetensors"].iter().any(|ending| path.ends_with(ending))
}

/// What a server does besides giving files.
#[derive(Default)]
struct Conduct {
    /// Asks for this token.
    token: Option<&'static str>,
    /// Sends only this many bytes of the data file at its first request.
    breaks_after: Option<usize>,
    /// Sends only this many bytes of the data file, and keeps the connection open.
    silent_after: Option<usize>,
    /// Sends another content of the data file, of the same size.
    lies: bool,
    /// Sends large files from this other server.
    cdn: Option<String>,
    /// Lists this path besides the files.
    lists: Option<&'static str>,
    /// Lists the data file with this size.
    size: Option<u64>,
    /// Answers with these bytes instead of the list of files.
    answers: Option<Vec<u8>>,
    /// Answers with these bytes instead of each file.
    gives: Option<Vec<u8>>,
    /// Sends a byte of the list of files each 100 ms.
    drips: bool,
}

type Log = Arc<Mutex<Vec<String>>>;

/// A server. Its log has a line for each request: path, range, and whether there was a token.
struct Hub {
    address: String,
    log: Log,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>, conduct: Conduct) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let log = Log::default();
        let (kept, shared) = (log.clone(), Arc::new((files, conduct)));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, shared) = (log.clone(), shared.clone());
                std::thread::spawn(move || stream.map(|stream| answer(stream, &shared.0, &shared.1, &log)));
            }
        });
        Hub { address, log: kept }
    }

    /// The paths asked for, those about the model's files first, and then forgets them.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().expect("the log"))
    }
}

fn head(status: u16, more: &str, length: usize) -> String {
    format!("HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n{more}connection: close\r\n\r\n")
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, conduct: &Conduct, log: &Log) {
    let mut reader = BufReader::new(stream.try_clone().expect("a stream"));
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_string());
    }
    let Some(path) = lines.first().and_then(|line| line.split(' ').nth(1)) else { return };
    let header = |name: &str| lines.iter().find_map(|line| line.to_lowercase().strip_prefix(name).map(str::to_string));
    let (range, token) = (header("range: bytes="), header("authorization: bearer "));
    let first = !log.lock().expect("the log").iter().any(|line| line.starts_with(path));
    let shown = range.as_deref().map(|range| format!(" from {range}")).unwrap_or_default();
    let with = if token.is_some() { " with token" } else { "" };
    log.lock().expect("the log").push(format!("{path}{shown}{with}"));
    if conduct.token.is_some() && token.as_deref() != conduct.token {
        drop(stream.write_all(head(401, "x-error-code: RepoNotFound\r\n", 0).as_bytes()));
        return;
    }
    let reply = match (path.split_once("/revision/"), &conduct.answers, &conduct.gives) {
        (Some(_), Some(bytes), _) | (None, _, Some(bytes)) => bytes.clone(),
        (Some((_, revision)), ..) => listing(revision, files, conduct),
        (None, ..) => content(path, range.as_deref(), first, files, conduct),
    };
    if conduct.drips {
        for byte in reply {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        return;
    }
    // The other side may have ended.
    drop(stream.write_all(&reply));
    if conduct.silent_after.is_some() && path.ends_with(DATA) {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// The answer about a model.
fn listing(revision: &str, files: &BTreeMap<String, Vec<u8>>, conduct: &Conduct) -> Vec<u8> {
    let commit = match revision.trim_end_matches("?blobs=true") {
        "main" | "refs%2Fpr%2F1" | COMMIT => COMMIT,
        "v1" | OLD => OLD,
        _ => return head(404, "x-error-code: RevisionNotFound\r\n", 0).into_bytes(),
    };
    let entry = |(path, content): (&String, &Vec<u8>)| {
        let size = conduct.size.filter(|_| path == DATA).unwrap_or(content.len() as u64);
        match is_large(path) {
            true => {
                json!({"rfilename": path, "size": size, "blobId": OLD, "lfs": {"sha256": id(path, content), "size": size}})
            }
            false => json!({"rfilename": path, "size": size, "blobId": id(path, content)}),
        }
    };
    let mut siblings: Vec<Value> = files.iter().map(entry).collect();
    siblings.extend(conduct.lists.map(|path| json!({"rfilename": path, "size": 1, "blobId": OLD})));
    let body = json!({"id": "org/tiny", "sha": commit, "siblings": siblings}).to_string();
    [head(200, "", body.len()).as_bytes(), body.as_bytes()].concat()
}

/// A file, or the rest of it.
fn content(
    path: &str,
    range: Option<&str>,
    first: bool,
    files: &BTreeMap<String, Vec<u8>>,
    conduct: &Conduct,
) -> Vec<u8> {
    let name = path.splitn(6, '/').nth(5).unwrap_or_default();
    let Some(content) = files.get(name) else { return head(404, "x-error-code: EntryNotFound\r\n", 0).into_bytes() };
    if let Some(cdn) = conduct.cdn.as_ref().filter(|_| is_large(name)) {
        return head(302, &format!("location: {cdn}{path}\r\n"), 0).into_bytes();
    }
    let mut content = content.clone();
    if conduct.lies && name == DATA {
        content[7] ^= 1;
    }
    let from: usize = range.map_or(0, |range| range.trim_end_matches('-').parse().expect("a range"));
    let end = match (conduct.breaks_after, conduct.silent_after) {
        (Some(end), _) if name == DATA && first => end,
        (_, Some(end)) if name == DATA => end,
        _ => content.len(),
    };
    let (status, more) = match range {
        Some(_) => (206, format!("content-range: bytes {from}-{}/{}\r\n", content.len() - 1, content.len())),
        None => (200, String::new()),
    };
    [head(status, &more, content.len() - from).as_bytes(), &content[from..end]].concat()
}

/// The shipped model with a second variant of a component, and files that no verb needs.
fn model() -> BTreeMap<String, Vec<u8>> {
    let root = PathBuf::from(fixture("model"));
    let mut files = BTreeMap::new();
    for folder in [root.clone(), root.join("onnx")] {
        for entry in fs::read_dir(folder).expect("the model") {
            let path = entry.expect("an entry").path();
            if path.is_file() {
                let name = path.strip_prefix(&root).expect("below").to_str().expect("a name").to_string();
                files.insert(name, fs::read(&path).expect("a file"));
            }
        }
    }
    let embedding = files["onnx/embed_tokens.onnx"].clone();
    files.insert("onnx/embed_tokens_q4.onnx".into(), embedding);
    files.insert("README.md".into(), b"---\nlicense: mit\n---\n# Tiny\n".to_vec());
    files.insert(".gitattributes".into(), b"*.onnx filter=lfs\n".to_vec());
    files.insert("model.safetensors".into(), vec![0; 4096]);
    files.insert("demo.mp4".into(), vec![1; 4096]);
    files
}

/// Runs the command with a cache of its own.
fn run(home: &Path, endpoint: &str, more: &[(&str, &str)], arguments: &[&str]) -> Output {
    command(home, endpoint, more, arguments).output().expect("the binary starts")
}

fn command(home: &Path, endpoint: &str, more: &[(&str, &str)], arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_interlace"));
    for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY"]
    {
        command.env_remove(name);
    }
    command.args(arguments).current_dir(home).env("HF_HOME", home).env("HF_ENDPOINT", endpoint).envs(more.to_vec());
    command
}

fn inspected(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    serde_json::from_str(&stdout(output)).expect("JSON")
}

fn cache(home: &Path) -> PathBuf {
    home.join("hub/models--org--tiny")
}

fn files_below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).expect("a folder") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => folders.push(path),
                false => found.push(path.strip_prefix(folder).expect("below").to_str().expect("a name").to_string()),
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_verb_downloads_the_files_that_it_needs_once_and_records_the_commit() {
    let home = tempfile::tempdir().expect("folder");
    let hub = Hub::start(model(), Conduct::default());
    let first = inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"]));
    assert_eq!(first["hub"]["model"], format!("hf:org/tiny@{COMMIT}"));
    let asked = hub.asked();
    assert!(asked[0].ends_with("/api/models/org/tiny/revision/main?blobs=true"), "{asked:?}");
    let unneeded = ["q4", "safetensors", "mp4", "gitattributes"];
    assert!(!asked.iter().any(|path| unneeded.iter().any(|part| path.contains(part))), "{asked:?}");
    let snapshot = files_below(&cache(home.path()).join("snapshots").join(COMMIT));
    assert!(snapshot.contains(&DATA.to_string()) && snapshot.contains(&"README.md".to_string()), "{snapshot:?}");
    assert_eq!(fs::read_to_string(cache(home.path()).join("refs/main")).expect("the ref"), COMMIT);
    // Every content lies under its digest.
    for blob in files_below(&cache(home.path()).join("blobs")) {
        let content = fs::read(cache(home.path()).join("blobs").join(&blob)).expect("a blob");
        let path = if blob.len() == 64 { "x.onnx" } else { "x.json" };
        assert_eq!(id(path, &content), blob);
    }
    // What is there is not asked for again, with the commit not even whether it is there.
    let second = inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny@refs/pr/1", "--json"]));
    assert_eq!((second, hub.asked().len()), (first.clone(), 1));
    let by_commit = format!("hf:org/tiny@{COMMIT}");
    let third = inspected(&run(home.path(), &hub.address, &[], &["inspect", &by_commit, "--json"]));
    assert_eq!((third, hub.asked().len()), (first.clone(), 0));
    // Without a network: told so, and found out.
    for (endpoint, more) in [(hub.address.as_str(), &[("HF_HUB_OFFLINE", "1")][..]), ("http://127.0.0.1:9", &[])] {
        let output = run(home.path(), endpoint, more, &["inspect", "hf:org/tiny", "--json"]);
        assert_eq!(inspected(&output), first);
        assert_eq!(stderr(&output).contains("out of reach"), more.is_empty(), "{}", stderr(&output));
    }
    assert!(hub.asked().is_empty());
    // A variant brings its own files only, and does not change what others see.
    let output = run(
        home.path(),
        &hub.address,
        &[],
        &["export", "hf:org/tiny", "--variant", "embed_tokens=q4", "--to", "triton", "-o", "out"],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let files = hub.asked();
    assert_eq!(files.iter().filter(|path| path.contains("/resolve/")).count(), 0, "the same content: {files:?}");
    assert_eq!(inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"])), first);
}

/// The second decoder of [`hub_with_q4`].
const Q4: &str = "onnx/decoder_model_merged_q4.onnx";

/// A hub whose model has its decoder in four bits too.
fn hub_with_q4() -> Hub {
    let folder = tempfile::tempdir().expect("folder");
    super::variants::model(folder.path());
    let mut files = model();
    files.insert(Q4.into(), fs::read(folder.path().join("model").join(Q4)).expect("a decoder"));
    Hub::start(files, Conduct::default())
}

#[test]
fn a_variant_that_a_verb_names_is_all_that_it_downloads_of_a_component() {
    let hub = hub_with_q4();
    let named = ["hf:org/tiny", "--variant", "decoder=q4"];
    for (arguments, status) in [
        (&["inspect"][..], 0),
        (&["plan", "--drop", "2,5", "-o", "plan.json"], 0),
        (&["prune", "--drop", "2,5", "-o", "pruned"], 0),
        // The model is opened before its checkpoint.
        (&["graft", "--base", "nothing", "--tuned", "nothing", "--dry-run"], 2),
    ] {
        let home = tempfile::tempdir().expect("folder");
        let output = run(home.path(), &hub.address, &[], &[arguments, &named].concat());
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", stderr(&output));
        let asked: Vec<String> = hub.asked().into_iter().filter(|path| path.contains("decoder_model_merged")).collect();
        assert!(asked.len() == 1 && asked[0].ends_with(Q4), "{arguments:?}: {asked:?}");
    }
}

/// `tune`, `run` and `sweep` find the model before their data.
#[test]
fn whole_runs_download_the_variants_that_are_named_alone() {
    let hub = hub_with_q4();
    let bench = fixture("data/bench-small.tsv");
    let head = "model = \"hf:org/tiny\"\noutput = \"out\"\ncalibration = { data = \"none\", samples = 2 }\n";
    let tail = format!("finetune = {{ data = \"none\" }}\neval = {{ benchmarks = [\"{bench}\"] }}\n");
    let recipe =
        format!("{head}variant = \"decoder=q4\"\nplan = {{ drop_count = 2, strategies = [\"shortgpt\"] }}\n{tail}");
    let sweep = format!("{head}drop_ratios = [0.2]\nstrategies = [\"shortgpt\"]\n{tail}");
    for arguments in [
        &["tune", "hf:org/tiny", "--variant", "decoder=q4", "--size", "1MB", "--data", "none", "-o", "out"][..],
        &["run", "recipe.toml"],
        &["sweep", "sweep.toml", "--variant", "decoder=q4"],
    ] {
        let home = tempfile::tempdir().expect("folder");
        fs::write(home.path().join("recipe.toml"), &recipe).expect("a recipe");
        fs::write(home.path().join("sweep.toml"), &sweep).expect("a sweep");
        let output = run(home.path(), &hub.address, &[], arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("none"), "{arguments:?}: {}", stderr(&output));
        let asked: Vec<String> = hub.asked().into_iter().filter(|path| path.contains("decoder_model_merged")).collect();
        assert!(asked.len() == 1 && asked[0].ends_with(Q4), "{arguments:?}: {asked:?}");
    }
}

#[test]
fn a_plan_holds_for_the_variant_that_it_was_made_with() {
    let hub = hub_with_q4();
    let home = tempfile::tempdir().expect("folder");
    let run = |arguments: &[&str]| run(home.path(), &hub.address, &[], arguments);
    let named = ["hf:org/tiny", "--variant", "decoder=q4"];
    let plan = ["plan", "--drop", "2,5", "-o"];
    let prune = ["prune", "--plan", "plan.json", "-o", "pruned"];
    assert_eq!(run(&[&plan[..], &["plan.json", "hf:org/tiny"]].concat()).status.code(), Some(0));
    let output = run(&[&prune[..], &named].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    for part in ["with no `--variant`, not with `--variant decoder=q4`", "make it anew with `--variant decoder=q4`"] {
        assert!(stderr(&output).contains(part), "{part}: {}", stderr(&output));
    }
    fs::remove_file(home.path().join("plan.json")).expect("removed");
    assert_eq!(run(&[&plan[..], &["plan.json"], &named].concat()).status.code(), Some(0));
    let output = run(&[&prune[..], &named].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_pruned_model_names_the_commit_that_it_is_from_and_no_output_lands_in_the_cache() {
    let home = tempfile::tempdir().expect("folder");
    let hub = Hub::start(model(), Conduct::default());
    let output = run(home.path(), &hub.address, &[], &["prune", "hf:org/tiny@v1", "--drop", "2,5", "-o", "pruned"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let read = |file: &str| fs::read_to_string(home.path().join("pruned").join(file)).expect("a file");
    assert!(read("interlace.json").contains(&format!("hf:org/tiny@{OLD}")), "{}", read("interlace.json"));
    assert!(read("README.md").contains("made from org/tiny"), "{}", read("README.md"));
    for name in ["pruned/onnx/decoder_model_merged.onnx_data", "pruned/config.json"] {
        assert!(!fs::symlink_metadata(home.path().join(name)).expect("a file").is_symlink(), "{name}");
    }
    let inside = cache(home.path()).join("snapshots").join(OLD).join("pruned");
    for target in [inside.clone(), cache(home.path()).join("pruned")] {
        let arguments = ["prune", "hf:org/tiny@v1", "--drop", "2,5", "-o", target.to_str().expect("a path")];
        let output = run(home.path(), &hub.address, &[], &arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("is in the Hugging Face cache"), "{}", stderr(&output));
        assert!(!target.exists());
    }
}

#[test]
fn a_cache_of_the_python_library_is_read_without_a_network() {
    let home = tempfile::tempdir().expect("folder");
    let root = cache(home.path());
    let snapshot = root.join("snapshots").join(COMMIT);
    fs::create_dir_all(snapshot.join("onnx")).expect("folders");
    fs::create_dir_all(root.join("blobs")).expect("folders");
    fs::create_dir_all(root.join("refs")).expect("folders");
    fs::write(root.join("refs/main"), COMMIT).expect("a ref");
    for (path, content) in model() {
        let name = id(&path, &content);
        fs::write(root.join("blobs").join(&name), content).expect("a blob");
        let up = "../".repeat(2 + path.matches('/').count());
        symlink(format!("{up}blobs/{name}"), snapshot.join(&path)).expect("a link");
    }
    let offline = [("HF_HUB_OFFLINE", "1")];
    let found = inspected(&run(home.path(), "http://127.0.0.1:9", &offline, &["inspect", "hf:org/tiny", "--json"]));
    assert_eq!(found["hub"]["model"], format!("hf:org/tiny@{COMMIT}"));
    // With a network nothing is downloaded either.
    let hub = Hub::start(model(), Conduct::default());
    inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"]));
    assert_eq!(hub.asked().len(), 1);
    let output = run(home.path(), "http://127.0.0.1:9", &offline, &["inspect", "hf:org/tiny@v1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("HF_HUB_OFFLINE is set"), "{}", stderr(&output));
}

#[test]
fn a_broken_download_leaves_no_file_and_continues_where_it_ended() {
    let home = tempfile::tempdir().expect("folder");
    let files = model();
    let (blob, size) = (id(DATA, &files[DATA]), files[DATA].len());
    // A server that breaks once: the same command continues.
    let hub = Hub::start(files.clone(), Conduct { breaks_after: Some(100_000), ..Conduct::default() });
    inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"]));
    let asked: Vec<String> = hub.asked().into_iter().filter(|path| path.contains("onnx_data")).collect();
    assert!(asked.len() == 2 && asked[1].ends_with("from 100000-"), "{asked:?}");
    // A part that an earlier command left.
    fs::remove_file(cache(home.path()).join("blobs").join(&blob)).expect("the blob");
    let part = cache(home.path()).join("blobs").join(format!("{blob}.incomplete"));
    fs::write(&part, &files[DATA][..size / 2]).expect("a part");
    let hub = Hub::start(files.clone(), Conduct::default());
    inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"]));
    let asked: Vec<String> = hub.asked().into_iter().filter(|path| path.contains("onnx_data")).collect();
    assert!(asked.len() == 1 && asked[0].ends_with(&format!("from {}-", size / 2)), "{asked:?}");
    assert!(!part.exists());
    // A part of another content is noticed by the digest, and nothing is kept.
    fs::remove_file(cache(home.path()).join("blobs").join(&blob)).expect("the blob");
    fs::write(&part, vec![0; size / 2]).expect("a part");
    let output = run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("has the digest"), "{}", stderr(&output));
    assert!(!part.exists() && !cache(home.path()).join("blobs").join(&blob).exists());
    inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"]));
}

#[test]
fn answers_that_are_not_as_listed_are_refused() {
    for (conduct, want) in [
        (Conduct { lies: true, ..Conduct::default() }, "has the digest"),
        (Conduct { lists: Some("../../x"), ..Conduct::default() }, "not one inside of the model"),
        (Conduct { lists: Some("/etc/x"), ..Conduct::default() }, "not one inside of the model"),
        (Conduct { size: Some(1000), ..Conduct::default() }, "is longer than its 1000 bytes"),
        (Conduct { size: Some(1 << 49), ..Conduct::default() }, "free disk space"),
        (Conduct { cdn: Some("ftp://127.0.0.1".into()), ..Conduct::default() }, "which is not followed"),
    ] {
        let home = tempfile::tempdir().expect("folder");
        let hub = Hub::start(model(), conduct);
        let output = run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny"]);
        assert_eq!(output.status.code(), Some(2), "{want}");
        assert!(stderr(&output).contains(want), "{want}: {}", stderr(&output));
        let data = cache(home.path()).join("blobs").join(id(DATA, &model()[DATA]));
        assert!(!data.exists() && !data.with_extension("incomplete").exists_with_content(), "{want}");
        assert!(!home.path().join("x").exists() && !home.path().join("hub/x").exists());
    }
}

trait Content {
    fn exists_with_content(&self) -> bool;
}

impl Content for PathBuf {
    fn exists_with_content(&self) -> bool {
        fs::metadata(self).is_ok_and(|data| data.len() > 0)
    }
}

#[test]
fn the_token_goes_to_the_hub_alone_and_refusals_say_what_to_do() {
    let home = tempfile::tempdir().expect("folder");
    let cdn = Hub::start(model(), Conduct::default());
    let conduct = Conduct { token: Some(TOKEN), cdn: Some(cdn.address.clone()), ..Conduct::default() };
    let hub = Hub::start(model(), conduct);
    let output = run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny"]);
    assert_eq!(output.status.code(), Some(2));
    for part in ["does not exist, or is private", "HF_TOKEN", "no token was found", "status 401"] {
        assert!(stderr(&output).contains(part), "{part}: {}", stderr(&output));
    }
    let wrong = run(home.path(), &hub.address, &[("HF_TOKEN", "hf_other")], &["inspect", "hf:org/tiny"]);
    assert!(stderr(&wrong).contains("a token was sent and is not enough"), "{}", stderr(&wrong));
    assert!(!stderr(&wrong).contains("hf_other"));
    // The token of `hf auth login`.
    fs::write(home.path().join("token"), format!("{TOKEN}\n")).expect("a token");
    inspected(&run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny", "--json"]));
    let asked = cdn.asked();
    assert!(asked.iter().any(|path| path.contains("onnx_data")), "{asked:?}");
    assert!(!asked.iter().any(|path| path.ends_with("with token")), "{asked:?}");
    for (name, want) in [
        ("hf:org/tiny@none", "has no revision `none`"),
        ("hf:../x", "expected hf:OWNER/NAME"),
        ("hf:org/tiny@../x", "is no name of a branch"),
        ("hf:tiny", "names no owner"),
    ] {
        let output = run(home.path(), &hub.address, &[], &["inspect", name]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        assert!(stderr(&output).contains(want), "{name}: {}", stderr(&output));
    }
}

#[test]
fn answers_in_another_form_say_what_is_wrong() {
    let reply = |status: u16, more: &str, body: &[u8]| [head(status, more, body.len()).as_bytes(), body].concat();
    let gzip = "content-encoding: gzip\r\n";
    let later = "retry-after: 100000\r\n";
    let answers = |bytes: Vec<u8>| Conduct { answers: Some(bytes), ..Conduct::default() };
    let gives = |bytes: Vec<u8>| Conduct { gives: Some(bytes), ..Conduct::default() };
    let long = format!("{{\"x\": \"{}\"}}", "y".repeat(33 << 20));
    for (conduct, want) in [
        (answers(reply(200, gzip, b"\x1f\x8b\x08")), "the encoding `gzip`, which was not asked for"),
        (gives(reply(200, gzip, b"\x1f\x8b\x08")), "the encoding `gzip`, which was not asked for"),
        (answers(reply(200, "", b"\xff\xfe{}")), "is not JSON"),
        (answers(reply(200, "", b"<html>log in</html>")), "is not JSON"),
        (answers(reply(200, "", long.as_bytes())), "is longer than 32 MiB"),
        (answers(reply(429, later, b"")), "run the command again in 100000 s"),
        (gives(reply(503, later, b"")), "run the command again in 100000 s"),
    ] {
        let home = tempfile::tempdir().expect("folder");
        let hub = Hub::start(model(), conduct);
        let output = run(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny"]);
        assert_eq!(output.status.code(), Some(2), "{want}");
        assert!(stderr(&output).contains(want), "{want}: {}", stderr(&output));
    }
    // Nobody listens there.
    let home = tempfile::tempdir().expect("folder");
    let nowhere = "http://127.0.0.1:1";
    for (more, offline) in [(&[][..], false), (&[("HF_HUB_OFFLINE", "1")], true)] {
        let output = run(home.path(), nowhere, more, &["inspect", "hf:org/tiny"]);
        assert_eq!(stderr(&output).contains("unset HF_HUB_OFFLINE"), offline, "{}", stderr(&output));
        assert!(stderr(&output).contains("HF_HOME"), "{}", stderr(&output));
    }
}

/// Runs a command, stops it by Ctrl-C once `ready`, and returns what it said and how long it took to end.
fn stopped(mut command: Command, ready: impl Fn() -> bool) -> (Output, Duration) {
    let child = command.stderr(std::process::Stdio::piped()).spawn().expect("the binary starts");
    while !ready() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let begun = Instant::now();
    // SAFETY: the child runs until `wait_with_output`.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    (child.wait_with_output().expect("the end"), begun.elapsed())
}

#[test]
fn ctrl_c_ends_a_list_that_comes_slowly() {
    let home = tempfile::tempdir().expect("folder");
    let hub = Hub::start(model(), Conduct { drips: true, ..Conduct::default() });
    let command = command(home.path(), &hub.address, &[], &["inspect", "hf:org/tiny"]);
    let (output, took) = stopped(command, || !hub.log.lock().expect("the log").is_empty());
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
}

/// A connection counts as broken after 20 s of silence; Ctrl-C does not wait for that.
#[test]
fn ctrl_c_ends_a_download_that_went_silent_and_the_next_command_continues_it() {
    let home = tempfile::tempdir().expect("folder");
    let files = model();
    let hub = Hub::start(files.clone(), Conduct { silent_after: Some(100_000), ..Conduct::default() });
    let part = cache(home.path()).join("blobs").join(format!("{}.incomplete", id(DATA, &files[DATA])));
    let inspect = ["inspect", "hf:org/tiny", "--json"];
    let command = command(home.path(), &hub.address, &[], &inspect);
    let (output, took) = stopped(command, || fs::metadata(&part).is_ok_and(|part| part.len() == 100_000));
    assert!(took < Duration::from_secs(8), "{took:?}");
    assert!(stderr(&output).contains("interrupted") && stderr(&output).contains("continues it"), "{}", stderr(&output));
    let hub = Hub::start(files, Conduct::default());
    inspected(&run(home.path(), &hub.address, &[], &inspect));
    let asked: Vec<String> = hub.asked().into_iter().filter(|path| path.contains("onnx_data")).collect();
    assert!(asked.len() == 1 && asked[0].ends_with("from 100000-"), "{asked:?}");
}
