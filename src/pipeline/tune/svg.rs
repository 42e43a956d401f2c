//! The front as a picture in SVG.

use std::fmt::Write;

use super::report::TuneReport;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
const MARGIN: f64 = 56.0;

/// The front as a line over time and likelihood kept, predicted, and the measured models as dots.
pub fn front_svg(report: &TuneReport) -> String {
    let line: Vec<(f64, f64)> =
        report.front.iter().map(|plan| (plan.predicted.ttft_ms, 100.0 * plan.predicted_kept)).collect();
    let dots: Vec<(f64, f64)> =
        report.candidates.iter().map(|own| (own.measured.ttft_ms, 100.0 * own.held_back_kept)).collect();
    let all = || line.iter().chain(&dots);
    let most_x = all().map(|point| point.0).fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.05;
    let most_y = all().map(|point| point.1).fold(100.0, f64::max) * 1.05;
    let x = |value: f64| MARGIN + (WIDTH - 2.0 * MARGIN) * value / most_x;
    let y = |value: f64| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * value / most_y;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    for step in 0..=5 {
        let (value_x, value_y) = (most_x * f64::from(step) / 5.0, most_y * f64::from(step) / 5.0);
        let (at_x, at_y) = (x(value_x), y(value_y));
        let (left, right, top, bottom) = (MARGIN, WIDTH - MARGIN, MARGIN, HEIGHT - MARGIN);
        let _ = writeln!(
            text,
            "<path d=\"M{left:.1} {at_y:.1}H{right:.1}M{at_x:.1} {top:.1}V{bottom:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value_y:.0}%</text>\
             <text x=\"{at_x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value_x:.3}</text>",
            left - 6.0,
            at_y + 4.0,
            bottom + 16.0
        );
    }
    let points: Vec<String> = line.iter().map(|&(time, kept)| format!("{:.1},{:.1}", x(time), y(kept))).collect();
    let _ =
        writeln!(text, "<polyline points=\"{}\" fill=\"none\" stroke=\"#36c\" stroke-width=\"2\"/>", points.join(" "));
    for (number, &(time, kept)) in dots.iter().enumerate() {
        let fill = if report.chosen == Some(number) { "#c33" } else { "#888" };
        let title = escaped(&report.candidates[number].plan.shown());
        let (at_x, at_y) = (x(time), y(kept));
        let _ = writeln!(
            text,
            "<circle cx=\"{at_x:.1}\" cy=\"{at_y:.1}\" r=\"5\" fill=\"{fill}\"><title>{title}</title></circle>"
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">milliseconds to the first token</text>\n\
         <text x=\"{MARGIN:.1}\" y=\"{:.1}\">likelihood of an answer token kept: line predicted, dots measured on \
         held-back samples, red chosen</text>\n</svg>",
        WIDTH / 2.0,
        HEIGHT - 14.0,
        MARGIN - 20.0
    );
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
