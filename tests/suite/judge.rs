//! MIA-Bench with a language model as judge: a small server that implements OpenAI's chat API.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use interlace::base::Cancel;
use interlace::eval::{ChatQuestion, Judge};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::cli::{interlace, stderr};

/// A request as the server received it.
struct Request {
    line: String,
    headers: Vec<String>,
    body: Value,
}

/// Reads a request; `None` when the connection ends.
fn request(stream: impl Read) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let mut headers = Vec::new();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        match header.trim() {
            "" => break,
            header => headers.push(header.to_lowercase()),
        }
    }
    let length = headers.iter().find_map(|header| header.strip_prefix("content-length: ")?.parse::<usize>().ok());
    let mut body = vec![0; length.expect("a length")];
    reader.read_exact(&mut body).ok()?;
    Some(Request { line: line.trim().to_string(), headers, body: serde_json::from_slice(&body).expect("JSON") })
}

/// A server that answers request number `n` with a status and a body. Status 0 sends no answer.
fn serve(answer: impl Fn(usize, &Request) -> (u16, String) + Send + 'static) -> (String, Receiver<Request>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}/v1", listener.local_addr().expect("an address"));
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for (number, stream) in listener.incoming().enumerate() {
            let Ok(mut stream) = stream else { break };
            let Some(request) = request(&stream) else { continue };
            let (status, body) = answer(number, &request);
            drop(sender.send(request));
            if status == 0 {
                silent.push(stream);
                continue;
            }
            drop(stream.write_all(reply(status, &body).as_bytes()));
        }
    });
    (address, receiver)
}

fn reply(status: u16, body: &str) -> String {
    format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

/// A file of `fixtures/tls`: an unknown certificate authority, and its certificate and key for `localhost`.
fn tls(file: &str) -> PathBuf {
    root().join("fixtures/tls").join(file)
}

/// As `serve`, over TLS and with the same answer to all. Counts the connection attempts.
fn serve_tls(body: String) -> (String, Arc<AtomicUsize>) {
    let certificates = CertificateDer::pem_file_iter(tls("server.pem")).expect("file").map(|one| one.expect("one"));
    let key = PrivateKeyDer::from_pem_file(tls("server_key.pem")).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(certificates.collect(), key);
    let config = Arc::new(config.expect("a configuration"));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("https://localhost:{}/v1", listener.local_addr().expect("an address").port());
    let tried = Arc::new(AtomicUsize::new(0));
    let counted = tried.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            counted.fetch_add(1, Ordering::SeqCst);
            let connection = ServerConnection::new(config.clone()).expect("a connection");
            let mut stream = StreamOwned::new(connection, stream.expect("a stream"));
            if request(&mut stream).is_some() {
                drop(stream.write_all(reply(200, &body).as_bytes()));
                stream.conn.send_close_notify();
                drop(stream.flush());
            }
        }
    });
    (address, tried)
}

fn chat_reply(text: &str) -> String {
    json!({"choices": [{"message": {"role": "assistant", "content": text}}]}).to_string()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// Three rows with the columns of MIA-Bench and pictures of the small benchmark.
fn benchmark(folder: &Path) {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(b'\t')
        .from_path(root().join("fixtures/data/bench-small.tsv"))
        .expect("file");
    let image = reader.headers().expect("head").iter().position(|name| name == "image").expect("pictures");
    let pictures = reader.records().map(|row| row.expect("row")[image].to_string());
    let pictures: Vec<String> = pictures.filter(|cell| cell.len() > 64).take(3).collect();
    let mut writer = csv::WriterBuilder::new().delimiter(b'\t').from_path(folder.join("MIA-Bench.tsv")).expect("file");
    let columns =
        ["index", "image", "question", "components", "component_weight", "component_type", "num_of_component"];
    writer.write_record(columns).expect("row");
    for (number, picture) in pictures.iter().enumerate() {
        let index = number.to_string();
        let row = [
            &index,
            picture,
            "Describe it in one word.",
            "['a description', 'one word']",
            "[4, 6]",
            "['describe', 'length']",
            "2",
        ];
        writer.write_record(row).expect("row");
    }
    writer.flush().expect("file");
}

fn eval(folder: &Path, judge: &[&str]) -> std::process::Output {
    eval_trusting(folder, judge, None)
}

/// With a file of trusted certificates.
fn eval_trusting(folder: &Path, judge: &[&str], certificates: Option<&Path>) -> std::process::Output {
    let model = root().join("fixtures/model");
    let mut arguments = vec![
        "eval",
        model.to_str().expect("path"),
        "--data",
        "MIA-Bench.tsv",
        "-o",
        "report.json",
        "--max-new-tokens",
        "4",
    ];
    arguments.extend(["--quiet"]);
    arguments.extend(judge);
    let mut command = Command::new(env!("CARGO_BIN_EXE_interlace"));
    command
        .args(&arguments)
        .current_dir(folder)
        .env("OPENAI_API_KEY", "secret-key")
        .env("SSL_CERT_FILE", certificates.unwrap_or(Path::new("")))
        .output()
        .expect("the binary starts")
}

#[test]
fn a_language_model_judges_mia_bench() {
    let folder = tempfile::tempdir().expect("folder");
    benchmark(folder.path());
    let output = eval(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is left out") && stderr(&output).contains("--judge"), "{}", stderr(&output));

    let (address, seen) = serve(|number, _| match number {
        0 => (503, "busy".into()),
        1 => (200, chat_reply("score of component 1: 2/4, score of component 2: 6/6, total score: 8/10. Fine.")),
        2 => (200, chat_reply("I would rather not say.")),
        _ => (200, chat_reply("score of component 1: 0/4, score of component 2: 3/6, total score: 3/10. Poor.")),
    });
    let output = eval(folder.path(), &["--judge", &address, "--judge-model", "referee"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = fs::read_to_string(folder.path().join("report.json")).expect("report");
    assert!(!report.contains("secret-key"));
    let report: Value = serde_json::from_str(&report).expect("JSON");
    let close = |value: &Value, want: f64| (value.as_f64().expect("a number") - want).abs() < 1e-9;
    assert!(close(&report["model"]["score"], 0.55), "{report}");
    assert!(close(&report["model"]["figures"]["unread_replies"], 1.0));
    let groups = report["model"]["by_column"]["component_type"].as_array().expect("groups");
    let score = |name: &str| &groups.iter().find(|group| group["group"] == name).expect("a group")["score"];
    assert!(close(score("describe"), 0.25) && close(score("length"), 0.75), "{groups:?}");
    assert_eq!(report["settings"]["judge"]["model"], "referee");
    let requests: Vec<Request> = seen.try_iter().collect();
    assert_eq!(requests.len(), 4);
    for request in &requests {
        assert_eq!(request.line, "POST /v1/chat/completions HTTP/1.1");
        assert!(request.headers.contains(&"authorization: bearer secret-key".to_string()), "{:?}", request.headers);
        assert_eq!(request.body["model"], "referee");
        let content = &request.body["messages"][0]["content"];
        let text = content[0]["text"].as_str().expect("text");
        assert!(text.contains("Describe it in one word.") && text.contains("2. (6 points) one word"), "{text}");
        let url = content[1]["image_url"]["url"].as_str().expect("a picture");
        assert!(url.starts_with("data:image/") && url.len() > 100, "{url}");
    }
}

fn question(_: usize) -> interlace::base::Result<ChatQuestion> {
    Ok(ChatQuestion { text: "q".into(), picture: vec![1] })
}

#[test]
fn a_failing_judge_is_reported_with_the_reason() {
    let judge = |address: &str| {
        let mut judge = Judge::new(address, "m").expect("a judge");
        (judge.timeout_s, judge.pause) = (1, Duration::from_millis(5));
        judge
    };
    let message = |answer: fn(usize, &Request) -> (u16, String)| {
        let (address, seen) = serve(answer);
        let error = judge(&address).ask_all(1, question, &Cancel::default()).unwrap_err().to_string();
        (error, seen.try_iter().count())
    };
    let (error, asked) = message(|_, _| (401, "no key".into()));
    assert!(error.contains("refuses the key") && error.contains("OPENAI_API_KEY") && asked == 1, "{error}");
    let (error, asked) = message(|_, _| (404, "no such model".into()));
    assert!(error.contains("status 404") && error.contains("no such model") && asked == 1, "{error}");
    let (error, asked) = message(|_, _| (500, "down".into()));
    assert!(error.contains("in 4 attempts: status 500: down") && asked == 4, "{error}");
    let (error, asked) = message(|_, _| (200, "{}".into()));
    assert!(error.contains("choices[0].message.content") && asked == 4, "{error}");
    let began = Instant::now();
    let (error, asked) = message(|_, _| (0, String::new()));
    assert!(error.contains("in 4 attempts") && asked == 4, "{error}");
    assert!((4..30).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    // No server listens at this address.
    let error = judge("http://127.0.0.1:9/v1").ask_all(1, question, &Cancel::default()).unwrap_err().to_string();
    assert!(error.contains("127.0.0.1:9") && error.contains("check the address"), "{error}");
}

/// A question counts as failed after 120 s of silence; Ctrl-C does not wait for that, nor for the pause before another attempt.
#[test]
fn ctrl_c_ends_the_wait_for_a_judge() {
    for (status, seconds) in [(0, 0), (500, 60)] {
        let (address, seen) = serve(move |_, _| (status, String::new()));
        let mut judge = Judge::new(&address, "m").expect("a judge");
        judge.pause = Duration::from_secs(seconds);
        let (cancel, begun) = (Cancel::default(), Instant::now());
        let stop = cancel.clone();
        std::thread::spawn(move || seen.recv().map(|_| stop.request()));
        let error = judge.ask_all(1, question, &cancel).unwrap_err().to_string();
        assert!(error.contains("no report is written"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    }
}

#[test]
fn replies_keep_the_order_of_their_questions() {
    let (address, _seen) = serve(|_, request| {
        (200, chat_reply(request.body["messages"][0]["content"][0]["text"].as_str().unwrap_or_default()))
    });
    let judge = Judge::new(&address, "m").expect("a judge");
    let question = |number: usize| Ok(ChatQuestion { text: number.to_string(), picture: Vec::new() });
    let replies = judge.ask_all(30, question, &Cancel::default()).expect("replies");
    assert_eq!(replies, (0..30).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[test]
fn a_judge_requires_a_model_name_and_an_address() {
    let folder = tempfile::tempdir().expect("folder");
    benchmark(folder.path());
    let output = eval(folder.path(), &["--judge", "localhost:8000", "--judge-model", "m"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("http://localhost:8000/v1"), "{}", stderr(&output));
    let output = interlace(folder.path(), &["eval", "m", "--data", "x.tsv", "-o", "r", "--judge", "http://x"]);
    assert!(stderr(&output).contains("--judge-model"), "{}", stderr(&output));
}

#[test]
fn a_judge_with_an_untrusted_certificate_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    benchmark(folder.path());
    let (address, tried) = serve_tls(chat_reply("score of component 1: 4/4, total score: 10/10. Fine."));
    let judge = ["--judge", &address, "--judge-model", "referee"];

    let output = eval(folder.path(), &judge);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in ["is not trusted", "certificate", "SSL_CERT_FILE", "localhost"] {
        assert!(message.contains(part), "expected `{part}` in: {message}");
    }
    assert_eq!(message.matches("SSL_CERT_FILE").count(), 1, "{message}");
    // Each question that is sent at the same time makes one attempt.
    assert!(tried.load(Ordering::SeqCst) <= 3, "{tried:?} connections");
    assert!(!folder.path().join("report.json").exists());

    let output = eval_trusting(folder.path(), &judge, Some(&tls("authority.pem")));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = fs::read_to_string(folder.path().join("report.json")).expect("report");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["model"]["score"], 1.0, "{report}");

    for (file, want) in [("server_key.pem", "holds no certificate"), ("none.pem", "cannot read")] {
        let output = eval_trusting(folder.path(), &judge, Some(&tls(file)));
        let message = stderr(&output);
        assert!(output.status.code() == Some(2) && message.contains(want), "{message}");
    }
}
