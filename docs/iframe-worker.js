// Browsers run no worker for a page that was opened from the disk, and Material's search needs one: there its script
// runs in a hidden frame, and messages go both ways.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    waiting = []

    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      this.scope.document.open()
      this.scope.document.close()
      this.scope.postMessage = data => setTimeout(() => this.dispatchEvent(new MessageEvent("message", {data})))
      const script = this.scope.document.createElement("script")
      script.src = url
      script.onload = () => {
        const waiting = this.waiting
        this.waiting = null
        waiting.forEach(data => this.postMessage(data))
      }
      this.scope.document.body.append(script)
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.scope.dispatchEvent(new MessageEvent("message", {data}))
    }
  }
}
