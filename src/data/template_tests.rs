//! Rendering of chat templates, and hostile templates.

use super::*;

fn messages() -> Vec<ChatMessage> {
    vec![
        ChatMessage {
            role: "user",
            content: Content::Parts(vec![ContentPart::Image, ContentPart::Text { text: "What <is> it?".into() }]),
        },
        ChatMessage { role: "assistant", content: Content::Text("a cat".into()) },
    ]
}

fn render(template: &str) -> Result<String> {
    let tokens = Map::from_iter([("bos_token".to_string(), Value::from("<s>"))]);
    ChatTemplate::new("chat_template.jinja", template, tokens)?.render(&messages(), true)
}

#[test]
fn templates_render_as_in_hugging_face() {
    let cases = [
        ("{{ bos_token }}{{ messages[0]['role'] | capitalize }}", "<s>User"),
        (
            "{% for m in messages %}\n  {% if loop.first %}\n{{ m.content | length }}\n  {% endif %}\n{% endfor %}",
            "2\n",
        ),
        ("{{ messages[0].content | tojson }}", r#"[{"type": "image"}, {"type": "text", "text": "What <is> it?"}]"#),
        ("{{ {'b': 1, 'a': []} | tojson(indent=2) }}", "{\n  \"b\": 1,\n  \"a\": []\n}"),
        ("{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration %}{% endfor %}", "userassistant"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content.strip() }}{% endfor %}",
            "a cat",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ tools is none }} {{ missing is defined }} {{ missing }}", "True False "),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages[1].content.split(' ')[-1] }}{{ 'x'.startswith('x') }}", "catTrue"),
    ];
    for (template, want) in cases {
        assert_eq!(render(template).unwrap(), want, "{template}");
    }
}

#[test]
fn hostile_templates_end_in_errors() {
    let cases = [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "fuel"),
        ("{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}", "failed to write output"),
        ("{% include '/etc/passwd' %}", "template"),
        ("{% if %}", "line 1"),
        ("{{ messages.__class__.x }}", "line 1"),
        ("{{ 'a\nb' | indent(10000000000) }}", "indent: a width or count above 9999"),
        ("{{ 'a\nb' | indent(width=10000000000) }}", "indent: a width or count above 9999"),
        ("{{ [1] | batch(10000000000) | list }}", "batch: a width"),
        ("{{ [1] | slice(10000000000) | list }}", "slice: a width"),
        ("{{ '%10000000000d' | format(1) }}", "format: a width"),
        ("{{ '%(n)-010000000000d' | format(n=1) }}", "format: a width"),
        ("{{ '%.10000000000f' | format(1.5) }}", "format: a width"),
        ("{{ 'a {:>10000000000} b'.format(1) }}", "format: a width"),
        ("{{ '{:.10000000000f}'.format(1.5) }}", "format: a width"),
        ("{{ '% 10000000000d' | format(1) }}", "format: a width"),
        ("{{ '%10000000000.2f' | format(1.5) }}", "format: a width"),
        ("{{ '%(a%b)10000000000d' | format(1) }}", "format: a width"),
        ("{{ '{:x>10000000000}'.format(1) }}", "format: a width"),
        ("{{ '{:{>10000000000}'.format(1) }}", "format: a width"),
        ("{{ '{:10000000000,d}'.format(1) }}", "format: a width"),
    ];
    for (template, want) in cases {
        let error = render(template).unwrap_err().to_string();
        assert!(error.contains(want), "{template}: {error}");
    }
    assert_eq!(render("{{ '%5d, 123456' | format(1234567) }}").unwrap(), "1234567, 123456");
    assert_eq!(render("{{ '{\"id\": 123456, \"n\": %d}' | format(1) }}").unwrap(), "{\"id\": 123456, \"n\": 1}");
    assert_eq!(
        render("{{ '{0:>10} 123456'.format(12345678) }}{{ 'a\nb'|indent(2) }}").unwrap(),
        "  12345678 123456a\n  b"
    );
}

/// A chain or a nesting that fills the largest template, and values as deep as the instructions allow, do not overflow
/// the stack.
#[test]
fn deep_templates_and_values_do_not_overflow_the_stack() {
    let chains = [
        ("{{ ", "not ", "1 }}"),
        ("{{ ", "-", "1 }}"),
        ("{{ ", "1 if 1 else ", "1 }}"),
        ("{{ ", "(", "1 }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ 1", " and 1", " }}"),
        ("{{ x", "|e", " }}"),
        ("{{ x", ".a", " }}"),
        ("{{ x", "()", " }}"),
        ("{{ x", "[0]", " }}"),
        ("{% if 1 %}", "{%elif 1%}", "{% endif %}"),
        ("", "{% if 1 %}", ""),
    ];
    for (before, link, after) in chains {
        let chain = format!("{before}{}{after}", link.repeat((MAX_TEMPLATE_BYTES - 60) / link.len()));
        // Whatever the template gives, the process goes on.
        let _ = render(&chain);
        let longer = format!("{before}{}{after}", link.repeat(MAX_TEMPLATE_BYTES / link.len() + 1));
        assert!(render(&longer).unwrap_err().to_string().contains("expected at most 262144"), "{link}");
    }
    let nest = "{% set ns = namespace(x=[]) %}{% for j in range(150) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}\
                {% endfor %}{% endfor %}";
    assert_eq!(render(&format!("{nest}x")).unwrap(), "x");
    assert_eq!(render(&format!("{nest}{{{{ (ns.x | string | length) > 300000 }}}}")).unwrap(), "True");
    assert_eq!(render(&format!("{nest}{{{{ (ns.x | tojson | length) > 300000 }}}}")).unwrap(), "True");
    assert_eq!(render(&format!("{nest}{{{{ ns.x == [ns.x] }}}}")).unwrap(), "False");
    let error = render(&nest.replace("150", "2500")).unwrap_err().to_string();
    assert!(error.contains("fuel"), "{error}");
}

/// Few instructions that each take long.
#[test]
fn a_template_that_takes_too_long_is_an_error() {
    let template = "{% for i in range(100000) %}{{ range(100000) | sort | length }}{% endfor %}";
    let begun = std::time::Instant::now();
    let result = ChatTemplate::limited("chat_template.jinja", template, Map::new(), Duration::from_millis(300));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("takes longer than 0.3 s to render") && error.contains("restore"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(60));
}
