// The page's words in two languages, and putting them in place.

const WORDS = {
  en: {
    worklist: "Worklist", open_only: "open only", filter: "Filter  /", open_file: "Open file", examples: "Examples",
    examples_title: "Add held-out studies of this site", empty: "No case is open.\nOpen a file, or let the PACS send one.",
    regions: "Regions", invert: "Invert", auto_window: "Auto", fit: "Fit", actual: "1 : 1", similar: "Similar cases",
    mouse_hint: "drag: window · wheel: zoom · right-drag: pan", draft: "Report", badge: "preliminary", domain: "Distance from this site's chests",
    accept: "Accept", edit: "Edit", reject: "Reject", redraft: "Redraft", back: "Back", close: "Close", keys: "Keys",
    help: "Keys (?)", login: "Sign in", login_text: "Paste the token that fedrad-site serve printed.", go_on: "Go on",
    language_title: "中文界面", model_title: "The release that writes the drafts", indication: "Indication",
    none_given: "none given", waiting: "waiting", drafting: "writing …", drafted: "draft", refused: "no draft",
    accepted: "accepted", rejected: "rejected", damaged: "damaged case", refused_title: "No draft was written.",
    refused_more: "Write your own report with E, or reject the case with R.",
    explain: "The number says how sure the model was of its words, not whether they are true. Dotted: a word it doubted.",
    accept_ask: "Accept this text as yours?", accept_yes: "Accept", reject_ask: "Why is this draft rejected?",
    reject_yes: "Reject", reason: "Reason", reason_optional: "Remark (optional)",
    reasons: ["Wrong side", "Missed finding", "Invented finding", "Wrong degree", "Poor image", "Other"],
    edited: (n) => n === 1 ? "1 word changed" : `${n} words changed`, unedited: "As drafted",
    done_accept: (n) => n ? `Accepted, ${n} word${n === 1 ? "" : "s"} changed` : "Accepted as drafted", done_reject: "Rejected",
    sure: "sure", indexing: (a, b) => b ? `Indexing this site's cases: ${a} of ${b}` : "Indexing this site's cases …",
    no_similar: "This site has no earlier cases to compare with.", alike: "alike", no_regions: "Regions are not at hand for this draft; draft again (D) to see them.",
    preliminary: "Preliminary. Drafted by", not_final: "Nothing here is final: a radiologist reads the image, corrects and signs in the report system.",
    window: "W", level: "L", by: "by", reason_given: "Reason", decided: (who) => `Decided by ${who}; the record is kept.`,
    added: (n) => `${n} case${n === 1 ? "" : "s"} added`, nothing_new: "No other held-out study to add", failed: "Failed",
    round: "round", no_epsilon: "no ε claimed", copied: "Text copied", cut: "The model did not end by itself; the broken end was cut off.",
    search_none: "No case matches.", drop: "Drop the file to open it", born: "born", prior: "Earlier case",
    key_list: [
      ["j k", "next, previous case"], ["↓ ↑", "next, previous sentence"], ["→ ←", "next, previous word"], ["o", "regions on, off"],
      ["a", "accept"], ["e", "edit"], ["r", "reject, with a reason"], ["d", "draft again"], ["c", "copy the text"],
      ["v", "similar cases"], ["x", "next similar case beside it"], ["Esc", "close, leave"],
      ["drag", "window and level"], ["wheel", "zoom"], ["right-drag", "pan"], ["[ ]", "narrower, wider window"], [", .", "lower, higher level"], ["w", "automatic window"], ["i", "invert"],
      ["− +", "zoom"], ["0  1", "fit, one to one"], ["Shift + arrows", "pan"], ["u", "open a file"],
      ["/", "filter the worklist"], ["l", "language"],
    ],
  },
  zh: {
    worklist: "工作列表", open_only: "仅未完成", filter: "筛选  /", open_file: "打开文件", examples: "示例",
    examples_title: "加入本院留出的检查", empty: "没有打开的病例。\n请打开文件，或由 PACS 发送。",
    regions: "依据区域", invert: "反相", auto_window: "自动窗", fit: "适应", actual: "1 : 1", similar: "相似病例",
    mouse_hint: "拖动：窗宽窗位 · 滚轮：缩放 · 右键拖动：平移", draft: "报告", badge: "初步", domain: "与本院胸片的距离",
    accept: "采纳", edit: "修改", reject: "退回", redraft: "重写", back: "返回", close: "关闭", keys: "快捷键",
    help: "快捷键 (?)", login: "登录", login_text: "请粘贴 fedrad-site serve 打印的令牌。", go_on: "继续",
    language_title: "English interface", model_title: "撰写草稿的模型版本", indication: "临床指征",
    none_given: "未提供", waiting: "等待", drafting: "撰写中 …", drafted: "草稿", refused: "无草稿",
    accepted: "已采纳", rejected: "已退回", damaged: "病例已损坏", refused_title: "未撰写草稿。",
    refused_more: "按 E 自行书写报告，或按 R 退回该病例。",
    explain: "数字表示模型对其用词的把握，不代表内容正确。点状下划线：模型存疑的词。",
    accept_ask: "以您的名义采纳此文本？", accept_yes: "采纳", reject_ask: "为何退回此草稿？",
    reject_yes: "退回", reason: "原因", reason_optional: "备注（可选）",
    reasons: ["左右错误", "遗漏征象", "虚构征象", "程度错误", "图像质量差", "其他"],
    edited: (n) => `改动 ${n} 个词`, unedited: "与草稿一致",
    done_accept: (n) => n ? `已采纳，改动 ${n} 个词` : "已按草稿采纳", done_reject: "已退回",
    sure: "把握", indexing: (a, b) => b ? `正在为本院病例建立索引：${a} / ${b}` : "正在为本院病例建立索引 …",
    no_similar: "本院没有可比较的既往病例。", alike: "相似", no_regions: "此草稿的依据区域已不可用；按 D 重写后可查看。",
    preliminary: "初步草稿，撰写：", not_final: "此处内容均非最终报告：须由放射科医师阅片、修改并在报告系统中签发。",
    window: "窗宽", level: "窗位", by: "由", reason_given: "原因", decided: (who) => `由 ${who} 决定；记录已保存。`,
    added: (n) => `已加入 ${n} 个病例`, nothing_new: "没有其他留出的检查", failed: "失败",
    round: "第", no_epsilon: "未声明 ε", copied: "文本已复制", cut: "模型未自行结束；不完整的结尾已删去。",
    search_none: "没有匹配的病例。", drop: "松开以打开文件", born: "出生", prior: "既往病例",
    key_list: [
      ["j k", "下一个、上一个病例"], ["↓ ↑", "下一句、上一句"], ["→ ←", "下一词、上一词"], ["o", "显示或隐藏区域"],
      ["a", "采纳"], ["e", "修改"], ["r", "退回并说明原因"], ["d", "重写草稿"], ["c", "复制文本"],
      ["v", "相似病例"], ["x", "并排显示下一个相似病例"], ["Esc", "关闭、离开"],
      ["拖动", "窗宽窗位"], ["滚轮", "缩放"], ["右键拖动", "平移"], ["[ ]", "窗宽变窄、变宽"], [", .", "窗位降低、升高"], ["w", "自动窗"], ["i", "反相"],
      ["− +", "缩放"], ["0  1", "适应、原大"], ["Shift + 方向键", "平移"], ["u", "打开文件"],
      ["/", "筛选工作列表"], ["l", "语言"],
    ],
  },
};

let language = localStorage.getItem("fedrad-language") || (navigator.language.startsWith("zh") ? "zh" : "en");

export const say = (name, ...values) => {
  const found = WORDS[language][name];
  return typeof found === "function" ? found(...values) : found;
};
export const current = () => language;
export const names = () => Object.keys(WORDS).map((one) => Object.keys(WORDS[one]).sort().join());

export function setLanguage(to) {
  language = to;
  localStorage.setItem("fedrad-language", to);
  place();
}

export function place() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = say(one.dataset.word);
  for (const one of document.querySelectorAll("[data-title]")) one.title = say(one.dataset.title);
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = say(one.dataset.placeholder);
  const button = document.getElementById("language");
  button.textContent = language === "zh" ? "EN" : "中文";
  button.lang = language === "zh" ? "en" : "zh";
}
